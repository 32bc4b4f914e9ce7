"""Labels: which atom each index of a value belongs to, and the moves that operators are made of.

The label of a value is a disjoint union of *boxes*. A box has an offset per axis and runs over some *indices*,
each along one axis with a stride counted in steps of that axis: ``(heads, features)`` flattened to one axis
is one box with two indices; a concatenation is two boxes. Axes of size 1 carry no index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from weightspace.spec.tracing._atoms import Atoms, Case, Product, Sum
from weightspace.spec.tracing._powers import Power, plus, times, unknown


class Index(NamedTuple):
    """A run of indices along an axis; ``power`` is how the value scales with the atom's units."""

    axis: int
    stride: int
    atom: int
    power: Power = ()


class Box(NamedTuple):
    """Part of a value: an offset per axis, and the indices that it runs over, sorted by axis and stride."""

    offsets: tuple[int, ...]
    indices: tuple[Index, ...]


class Label(NamedTuple):
    """The label of a value.

    Args:
        shape: of the value.
        boxes: disjoint, and together all of it.
        shift: the bias that was added last, see :class:`Shift`.
        zero: whether it is known to be 0 everywhere.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    shift: Shift | None = None
    zero: bool = False


class Shift(NamedTuple):
    """The value is ``factor * (something + bias)``, and the bias is used nowhere else."""

    tensor: str
    factor: float


Pair = tuple[Index, Index]


class ConflictError(Exception):
    """Two ways to write one axis as a product that have no common refinement."""


class Labels:
    """Moves on labels that share atoms, and the equations that their powers must satisfy.

    Args:
        powers: ``None`` while atoms are being restricted; then ``"positive"`` or ``"sign"``, the system whose
            equations are collected.
    """

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.powers: str | None = None
        self.equations: list[Power] = []
        self.flips: dict[tuple[int, Shift], int] = {}
        self.unknowns: list[int] = []
        self.slack: dict[int, int] = {}
        self.reason = ""

    # -- making labels -------------------------------------------------------------------------------------

    def fresh(self, shape: Sequence[int], fixed: Sequence[bool] | bool = False, reason: str = "") -> Label:
        """A value about which nothing is known but which of its axes are fixed.

        All its axes may depend on each other.
        """
        shape = tuple(shape)
        axes = [fixed] * len(shape) if isinstance(fixed, bool) else list(fixed)
        numbers = {
            axis: self.atoms.fresh(size, (), reason or self.reason if axes[axis] else None)
            for axis, size in enumerate(shape)
            if size > 1
        }
        self.atoms.entangle(list(numbers.values()))
        indices = tuple(Index(axis, 1, number) for axis, number in numbers.items())
        return Label(shape, (Box((0,) * len(shape), indices),))

    def fixed(self, shape: Sequence[int]) -> Label:
        """A value that never moves."""
        return self.fresh(shape, True)

    def loose(self, label: Label) -> Label:
        """A value that is 0 everywhere scales with whatever it meets; any other label as it is."""
        if self.powers is None or not label.zero:
            return label
        label = self.resolve(label)
        boxes = []
        for box in label.boxes:
            numbers = [self.unknown_power() for _ in box.indices]
            self.slack.update(zip(numbers, (index.atom for index in box.indices), strict=True))
            indices = [i._replace(power=unknown(n)) for i, n in zip(box.indices, numbers, strict=True)]
            boxes.append(box._replace(indices=tuple(indices)))
        return label._replace(boxes=tuple(boxes), zero=False)

    # -- reading labels ------------------------------------------------------------------------------------

    def resolve(self, label: Label) -> Label:
        """The same label in terms of the atoms that its atoms have become."""
        boxes: list[Box] = []
        for box in label.boxes:
            boxes.extend(self._resolve_box(box))
        return label._replace(boxes=tuple(boxes))

    def _resolve_box(self, box: Box) -> Iterator[Box]:
        todo: list[tuple[Box, tuple[tuple[int, int, int], ...]]] = [(box, ())]
        while todo:
            box, choices = todo.pop()
            step = self._expand(box, choices)
            if step is None:
                yield _sorted(box)
            else:
                todo.extend(reversed(step))

    def _expand(
        self, box: Box, choices: tuple[tuple[int, int, int], ...]
    ) -> list[tuple[Box, tuple[tuple[int, int, int], ...]]] | None:
        """The box with one of its atoms replaced by what that has become; None if all are final.

        ``choices`` remembers (cut atom, axis, part) so that the copies of what depends on it are found.
        """
        cases: list[tuple[int, int, Case]] = []
        for at, index in enumerate(box.indices):
            number = self.atoms.find(index.atom)
            link = self.atoms[number].link
            if isinstance(link, Product):
                inner = self.atoms[link.inner].size
                both = (
                    index._replace(stride=index.stride * inner, atom=link.outer),
                    index._replace(atom=link.inner),
                )
                return [(_with(box, at, both), choices)]
            if isinstance(link, Sum):
                return [
                    (part, (*choices, (number, index.axis, place)))
                    for place, part in enumerate(self._parts(box, at, link))
                ]
            if isinstance(link, Case):
                cases.append((at, number, link))
            elif number != index.atom:
                return [(_with(box, at, (index._replace(atom=number),)), choices)]
        # only once every occurrence of what was cut has its part: an index looks for it on its own axis first
        for at, _, link in cases:
            place = _chosen(choices, link.on, box.indices[at].axis)
            if place is not None:
                return [(_with(box, at, (box.indices[at]._replace(atom=link.copies[place]),)), choices)]
        if cases:
            at, number, _ = cases[-1]
            for leaf in self.atoms.leaves(number):
                self.atoms.pin(leaf, "it depends on an index that occurs twice")
                self.atoms.release(leaf)
            size = self.atoms[number].size
            plain = self.atoms.fresh(size, (), "it depends on an index that occurs twice")
            return [(_with(box, at, (box.indices[at]._replace(atom=plain),)), choices)]
        return None

    def _parts(self, box: Box, at: int, link: Sum) -> Iterator[Box]:
        index, start = box.indices[at], 0
        for part in link.parts:
            size = self.atoms[part].size
            offsets = list(box.offsets)
            offsets[index.axis] += start * index.stride
            kept = (index._replace(atom=part),) if size > 1 else ()
            yield _with(box._replace(offsets=tuple(offsets)), at, kept)
            start += size

    def numbers(self, label: Label, axes: Iterable[int] | None = None) -> list[int]:
        """The atoms on some axes of a resolved label (all by default), each once."""
        wanted = None if axes is None else set(axes)
        found = dict.fromkeys(
            index.atom
            for box in label.boxes
            for index in box.indices
            if wanted is None or index.axis in wanted
        )
        return list(found)

    def is_fixed(self, label: Label) -> bool:
        """Whether no unit of a resolved label may move."""
        return not any(self.atoms.is_live(number) for number in self.numbers(label))

    # -- restrictions --------------------------------------------------------------------------------------

    def pin(self, label: Label, axes: Iterable[int] | None = None, reason: str | None = None) -> Label:
        """Fix some axes (all by default), and let nothing depend on them."""
        label = self.resolve(label)
        for number in self.numbers(label, axes):
            self.atoms.pin(number, reason or self.reason)
            self.atoms.release(number)
        return label

    def scope(self, label: Label, axes: Iterable[int], allowed: Iterable[int]) -> None:
        """Let the permutations on ``axes`` of a resolved label depend on nothing outside ``allowed`` axes."""
        axes, allowed = set(axes), set(allowed)
        parents: dict[int, set[int]] = {}
        for box in label.boxes:
            within = {index.atom for index in box.indices if index.axis in allowed}
            for index in box.indices:
                if index.axis in axes:
                    parents[index.atom] = parents.get(index.atom, within) & within
        self.atoms.restrict(parents)

    def unify(
        self, first: Label, second: Label, axes: Sequence[tuple[int, int]]
    ) -> tuple[Label, Label, list[Pair]]:
        """Let two labels agree on pairs of axes, jointly.

        Returns:
            Both, resolved, and the pairs of indices that are now the same.
        """
        while True:
            first, second = self.resolve(first), self.resolve(second)
            found = self._matches(first, second, axes)
            if found is not None:
                self.atoms.merge((a.atom, b.atom) for a, b in found)
                return self.resolve(first), self.resolve(second), found

    def _matches(self, first: Label, second: Label, axes: Sequence[tuple[int, int]]) -> list[Pair] | None:
        """All pairs of indices that must be identified; None after an atom had to be split."""
        pairs: list[Pair] = []
        for a in first.boxes:
            for b in second.boxes:
                found = self._match(a, b, axes)
                if found is None:
                    return None
                pairs.extend(found)
        return list(dict.fromkeys(pairs))

    def _match(self, a: Box, b: Box, axes: Sequence[tuple[int, int]]) -> list[Pair] | None:
        runs: list[tuple[list[Run], list[Run]]] = []
        for on_a, on_b in axes:
            of_a, of_b = _on(a, on_a), _on(b, on_b)
            if a.offsets[on_a] == b.offsets[on_b] and self._alike(of_a, of_b):
                runs.append(([Run(i.stride, 0, i) for i in of_a], [Run(i.stride, 0, i) for i in of_b]))
                continue
            if self._disjoint(a, on_a, b, on_b):
                return []
            inert = all(self.atoms.is_inert(index.atom) for index in (*of_a, *of_b))
            if inert and self._is_dense(a, on_a) and self._is_dense(b, on_b):
                continue
            try:
                strides = _chain({1} | {i.stride for i in (*of_a, *of_b)})
                fits_a = self.fit(of_a, a.offsets[on_a], strides)
                fits_b = self.fit(of_b, b.offsets[on_b], strides)
            except ConflictError:
                self._give_up(of_a, of_b)
                continue
            if fits_a is None or fits_b is None:
                return None
            runs.append((fits_a, fits_b))
        for of_a_runs, of_b_runs in runs:
            if any(self._apart(x, y) for x, y in zip(of_a_runs, of_b_runs, strict=True)):
                return []
        cuts = [
            self._cut_to_common(x, y)
            for of_a_runs, of_b_runs in runs
            for x, y in zip(of_a_runs, of_b_runs, strict=True)
        ]
        if any(cuts):
            return None
        return [
            (x.entry, y.entry)
            for of_a_runs, of_b_runs in runs
            for x, y in zip(of_a_runs, of_b_runs, strict=True)
            if x.entry is not None and y.entry is not None
        ]

    def overlap(self, a: Box, b: Box, axes: Iterable[int]) -> bool:
        """Whether two boxes of unified labels cover the same places of some axes."""
        return all(
            (a.offsets[axis] == b.offsets[axis] and self._alike(_on(a, axis), _on(b, axis)))
            or (
                not self._disjoint(a, axis, b, axis)
                and all(self.atoms.is_inert(index.atom) for index in (*_on(a, axis), *_on(b, axis)))
            )
            for axis in axes
        )

    def common_run(self, a: Box, b: Box, axis: int) -> tuple[int, Sequence[Index]] | None:
        """Offset and index of what two boxes share of a fixed axis; None if they divide the axis alike."""
        of_a, of_b = _on(a, axis), _on(b, axis)
        if a.offsets[axis] == b.offsets[axis] and self._alike(of_a, of_b):
            return None
        (low_a, high_a), (low_b, high_b) = self.hull(a, axis), self.hull(b, axis)
        low, high = max(low_a, low_b), min(high_a, high_b)
        if low == high:
            return low, ()
        return low, (Index(axis, 1, self.atoms.fresh(high - low + 1, (), self.reason)),)

    def _is_dense(self, box: Box, axis: int) -> bool:
        low, high = self.hull(box, axis)
        return math.prod(self.size(index) for index in _on(box, axis)) == high - low + 1

    def _alike(self, of_a: Sequence[Index], of_b: Sequence[Index]) -> bool:
        return len(of_a) == len(of_b) and all(
            x.stride == y.stride and self.size(x) == self.size(y) for x, y in zip(of_a, of_b, strict=True)
        )

    def _disjoint(self, a: Box, on_a: int, b: Box, on_b: int) -> bool:
        low_a, high_a = self.hull(a, on_a)
        low_b, high_b = self.hull(b, on_b)
        return high_a < low_b or high_b < low_a

    def _give_up(self, *sides: Sequence[Index]) -> None:
        for indices in sides:
            for index in indices:
                self.atoms.pin(index.atom, f"{self.reason}: two incompatible ways to factor the axis")
                self.atoms.release(index.atom)

    def size(self, index: Index) -> int:
        """How many indices it runs over."""
        return self.atoms[index.atom].size

    def hull(self, box: Box, axis: int) -> tuple[int, int]:
        """First and last position of a box on an axis."""
        low = box.offsets[axis]
        return low, low + sum((self.size(i) - 1) * i.stride for i in box.indices if i.axis == axis)

    def fit(self, indices: Sequence[Index], offset: int, strides: Sequence[int]) -> list[Run] | None:
        """One run per stride (largest first), each within its digit of the mixed radix system ``strides``.

        None after an atom had to be split as a product or cut.

        Raises:
            ConflictError: an index runs over parts of digits that no cut can mend.
        """
        by_stride = {index.stride: index for index in indices}
        runs = []
        for place, stride in enumerate(strides):
            radix = strides[place - 1] // stride if place else None
            digit = offset // stride if radix is None else offset // stride % radix
            index = by_stride.get(stride)
            if index is None:
                runs.append(Run(stride, digit, None))
                continue
            size = self.size(index)
            if radix is not None and digit + size > radix:
                self._refine(index, digit, size, radix)
                return None
            runs.append(Run(stride, digit, index))
        return runs

    def _refine(self, index: Index, digit: int, size: int, radix: int) -> None:
        if digit == 0 and size % radix == 0:
            self.atoms.split(index.atom, radix)
            return
        head = radix - digit
        middle = (size - head) // radix * radix
        self.atoms.cut(index.atom, [part for part in (head, middle, size - head - middle) if part])

    def _apart(self, x: Run, y: Run) -> bool:
        return x.start + self.length(x) <= y.start or y.start + self.length(y) <= x.start

    def _cut_to_common(self, x: Run, y: Run) -> bool:
        """Cut two overlapping runs where one begins or ends within the other; whether that was needed."""
        ends = sorted({x.start, y.start, x.start + self.length(x), y.start + self.length(y)})
        changed = False
        for run in (x, y):
            within = [end for end in ends if run.start <= end <= run.start + self.length(run)]
            sizes = [after - before for before, after in pairwise(within)]
            if len(sizes) > 1 and run.entry is not None and self.atoms[run.entry.atom].link is None:
                self.atoms.cut(run.entry.atom, sizes)
                changed = True
        return changed

    def length(self, run: Run) -> int:
        """How many indices a run has."""
        return 1 if run.entry is None else self.size(run.entry)

    # -- axes ----------------------------------------------------------------------------------------------

    def reaxis(self, label: Label, axes: Sequence[int | None], shape: Sequence[int]) -> Label:
        """A label whose axis ``k`` is axis ``axes[k]`` of this one, or new (of size 1) for None."""
        to = {axis: place for place, axis in enumerate(axes) if axis is not None}
        boxes = tuple(
            _sorted(
                Box(
                    tuple(0 if axis is None else box.offsets[axis] for axis in axes),
                    tuple(index._replace(axis=to[index.axis]) for index in box.indices if index.axis in to),
                )
            )
            for box in label.boxes
        )
        return label._replace(shape=tuple(shape), boxes=boxes)

    def drop(self, label: Label, axes: Iterable[int]) -> Label:
        """Take axes away, as a sum over them does; the others may not depend on them."""
        gone = set(axes)
        rest = [axis for axis in range(len(label.shape)) if axis not in gone]
        label = self.resolve(label)
        self.scope(label, rest, rest)
        label = self.resolve(label)
        projected = self.reaxis(label, rest, [label.shape[axis] for axis in rest])
        return self._overlap(projected)._replace(shift=None)

    def _overlap(self, label: Label) -> Label:
        """Let boxes that cover the same units agree, and keep one of each."""
        label = self._distinct(label)
        if len(label.boxes) > 1:
            axes = [(axis, axis) for axis in range(len(label.shape))]
            label, _, pairs = self.unify(label, label, axes)
            self.equal(pairs)
            label = self._distinct(label)
        return label

    def _distinct(self, label: Label) -> Label:
        kept: dict[tuple[object, ...], Box] = {}
        for box in label.boxes:
            key = (box.offsets, tuple((i.axis, i.stride, self.atoms.find(i.atom)) for i in box.indices))
            if key in kept:
                self.equal(zip(kept[key].indices, box.indices, strict=True))
            else:
                kept[key] = box
        return label._replace(boxes=tuple(kept.values()))

    def freeze(self, label: Label, sizes: Mapping[int, int]) -> Label:
        """Fix axes, which get new sizes: what convolution and pooling do to space."""
        blank = self._blank(label, sizes)
        shape = tuple(sizes.get(axis, size) for axis, size in enumerate(label.shape))
        return self._fill(blank._replace(shape=shape), sizes)

    def _blank(self, label: Label, axes: Iterable[int]) -> Label:
        """Fix axes and take their indices away."""
        gone = set(axes)
        label = self.pin(label, gone)
        rest = [axis for axis in range(len(label.shape)) if axis not in gone]
        places = [rest.index(axis) if axis in rest else None for axis in range(len(label.shape))]
        return self.reaxis(self.drop(label, gone), places, label.shape)

    def _fill(self, label: Label, axes: Iterable[int]) -> Label:
        """Give axes without indices a fixed one."""
        sizes = {axis: label.shape[axis] for axis in axes if label.shape[axis] > 1}
        fixed = [Index(axis, 1, self.atoms.fresh(size, (), self.reason)) for axis, size in sizes.items()]
        boxes = tuple(_sorted(box._replace(indices=(*box.indices, *fixed))) for box in label.boxes)
        return label._replace(boxes=boxes)

    def expand(self, label: Label, shape: Sequence[int]) -> Label:
        """Repeat along axes of size 1: every repetition may be permuted, whatever the other indices."""
        label = self.resolve(label)
        boxes = []
        for box in label.boxes:
            for axis, (old, new) in enumerate(zip(label.shape, shape, strict=True)):
                if old != new:
                    others = {index.atom for index in box.indices}
                    number = self.atoms.fresh(new, others)
                    self.atoms.restrict({number: others})
                    box = _sorted(box._replace(indices=(*box.indices, Index(axis, 1, number))))
            boxes.append(box)
        return label._replace(shape=tuple(shape), boxes=tuple(boxes), shift=None)

    def reshape(self, label: Label, shape: Sequence[int]) -> Label:
        """Read the elements in row-major order as another shape."""
        shape = tuple(shape)
        label = self.resolve(label)
        if shape == label.shape:
            return label
        blank: list[int] = []
        for before, after in regroup(label.shape, shape):
            sizes = [shape[axis] for axis in after]
            if [n for n in (label.shape[axis] for axis in before) if n > 1] == [n for n in sizes if n > 1]:
                continue
            fitted = None if self.is_plain(label, before) else self._fitted(label, before, sizes)
            label = self._blank(label, before) if fitted is None else fitted
            blank += after if fitted is None else []
        return self._fill(_moved(label, shape), blank)

    def is_plain(self, label: Label, axes: Sequence[int]) -> bool:
        """Whether the axes of a resolved label are plain fixed indices, the same in all boxes."""
        seen = {tuple((box.offsets[axis], *_on(box, axis)) for axis in axes) for box in label.boxes}
        return len(seen) == 1 and all(self.atoms.is_inert(number) for number in self.numbers(label, axes))

    def _fitted(self, label: Label, axes: Sequence[int], sizes: Sequence[int]) -> Label | None:
        """The label with its atoms split until each lies within one axis of the new sizes, or None."""
        scale = row_major([label.shape[axis] for axis in axes])
        wanted = set(row_major(sizes)) | {1}
        while True:
            label = self.resolve(label)
            try:
                if all(self._fits(box, axes, scale, wanted) for box in label.boxes):
                    return label
            except ConflictError:
                return None

    def _fits(self, box: Box, axes: Sequence[int], scale: Sequence[int], wanted: set[int]) -> bool:
        flat = [
            index._replace(stride=index.stride * step)
            for axis, step in zip(axes, scale, strict=True)
            for index in _on(box, axis)
        ]
        offset = sum(box.offsets[axis] * step for axis, step in zip(axes, scale, strict=True))
        return self.fit(flat, offset, _chain(wanted | {index.stride for index in flat})) is not None

    # -- powers --------------------------------------------------------------------------------------------

    def unknown_power(self) -> int:
        """A new unknown of the system of powers."""
        self.unknowns.append(len(self.unknowns))
        return self.unknowns[-1]

    def vanish(self, powers: Iterable[Power]) -> None:
        """These must be zero."""
        if self.powers is not None:
            self.equations.extend(power for power in powers if power)

    def equal(self, pairs: Iterable[Pair]) -> None:
        """The powers of these must agree."""
        if self.powers is not None:
            self.vanish(plus(a.power, times(b.power, -1)) for a, b in pairs)

    def with_powers(self, label: Label, change: Callable[[Power], Power]) -> Label:
        """The label with every power replaced."""
        if self.powers is None:
            return label
        return label._replace(
            boxes=tuple(
                box._replace(indices=tuple(i._replace(power=change(i.power)) for i in box.indices))
                for box in label.boxes
            )
        )


class Run(NamedTuple):
    """What a box covers of one digit of a mixed radix system: one place, or an index from ``start`` on."""

    stride: int
    start: int
    entry: Index | None


def _on(box: Box, axis: int) -> list[Index]:
    return [index for index in box.indices if index.axis == axis]


def _sorted(box: Box) -> Box:
    return box._replace(indices=tuple(sorted(box.indices, key=lambda index: (index.axis, -index.stride))))


def _with(box: Box, at: int, indices: tuple[Index, ...]) -> Box:
    return box._replace(indices=(*box.indices[:at], *indices, *box.indices[at + 1 :]))


def _chosen(choices: Sequence[tuple[int, int, int]], on: int, axis: int) -> int | None:
    """Which part of ``on`` an index on ``axis`` lies in: that on its own axis, else the only one."""
    places = [(at, place) for number, at, place in choices if number == on]
    own = {place for at, place in places if at == axis}
    found = own or {place for _, place in places}
    return found.pop() if len(found) == 1 else None


def _chain(strides: set[int]) -> list[int]:
    """Strides from the largest to 1, each a multiple of the next.

    Raises:
        ConflictError: they are not.
    """
    ordered = sorted(strides, reverse=True)
    if any(larger % smaller for larger, smaller in pairwise(ordered)):
        raise ConflictError
    return ordered


def row_major(sizes: Sequence[int]) -> list[int]:
    """Stride of each axis, in elements."""
    return [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]


def regroup(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of consecutive axes that hold the same elements before and after a reshape."""
    groups: list[tuple[list[int], list[int]]] = [([], [])]
    left = right = 1
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = groups[-1]
        if i < len(old) and (left <= right or j == len(new)):
            before.append(i)
            left *= old[i]
            i += 1
        else:
            after.append(j)
            right *= new[j]
            j += 1
        if left == right and before and after:
            groups.append(([], []))
            left = right = 1
    if groups[-1] == ([], []):
        groups.pop()
    return groups


def _moved(label: Label, shape: tuple[int, ...]) -> Label:
    """The same elements under new axes; every index lies within one of them."""
    groups = [
        (
            before,
            after,
            row_major([label.shape[axis] for axis in before]),
            row_major([shape[axis] for axis in after]),
        )
        for before, after in regroup(label.shape, shape)
    ]
    boxes = []
    for box in label.boxes:
        offsets, indices = [0] * len(shape), []
        for before, after, scale, wanted in groups:
            flat = sum(box.offsets[axis] * step for axis, step in zip(before, scale, strict=True))
            for axis, step in zip(after, wanted, strict=True):
                offsets[axis] = flat // step % shape[axis]
            for axis, step in zip(before, scale, strict=True):
                for index in _on(box, axis):
                    stride = index.stride * step
                    place = next(
                        at for at, new in enumerate(wanted) if stride >= new and shape[after[at]] > 1
                    )
                    indices.append(index._replace(axis=after[place], stride=stride // wanted[place]))
        boxes.append(_sorted(Box(tuple(offsets), tuple(indices))))
    return Label(shape, tuple(boxes), None, label.zero)
