"""From atoms to a spec: what is left to move becomes groups, boxes become cells."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from weightspace.errors import SpecWarning
from weightspace.spec._types import (
    Cell,
    Dim,
    Exponent,
    Frozen,
    Group,
    Provenance,
    Scaling,
    TensorKind,
    TensorSpec,
    WeightSpec,
)
from weightspace.spec.tracing._atoms import Atoms
from weightspace.spec.tracing._labels import Box, Index, Label, row_major
from weightspace.spec.tracing._powers import Power
from weightspace.spec.tracing._scalings import Solution, phase_step
from weightspace.spec.tracing._trace import Trace

LARGEST_EXPANSION = 64  # copies of a group, one for each index of a fixed axis that it depends on


def settle(trace: Trace) -> None:
    """Make the labels of the parameters final: copies for fixed parents, parents that are found uniquely."""
    changed = True
    while changed:
        trace.parameters = {name: trace.resolve(label) for name, label in trace.parameters.items()}
        changed = _expand_one(trace) or _disambiguate(trace)


def _expand_one(trace: Trace) -> bool:
    atoms = trace.atoms
    for label in trace.parameters.values():
        for number in trace.numbers(label):
            for parent in sorted(atoms[number].parents):
                if atoms.is_live(parent):
                    continue
                if atoms[parent].size > LARGEST_EXPANSION:
                    warnings.warn(
                        f"trace: {atoms[number].size} units could move differently for each of {atoms[parent].size} fixed "
                        f"indices, more than {LARGEST_EXPANSION}; they are taken to move alike",
                        SpecWarning,
                        stacklevel=2,
                    )
                    atoms.release(parent)
                else:
                    atoms.cut(parent, [1] * atoms[parent].size)
                return True
    return False


def _disambiguate(trace: Trace) -> bool:
    atoms = trace.atoms
    for label in trace.parameters.values():
        for box in label.boxes:
            for index in box.indices:
                lost = {
                    parent for parent in atoms[index.atom].parents if _binding(box, index, parent) is None
                }
                if lost:
                    atoms.restrict({index.atom: atoms[index.atom].parents - lost})
                    return True
    return False


def _binding(box: Box, index: Index, parent: int) -> int | None:
    """Where the parent of an index stands in its box: on the same axis, else anywhere, but once."""
    places = [at for at, other in enumerate(box.indices) if other.atom == parent]
    own = [at for at in places if box.indices[at].axis == index.axis]
    found = own or places
    return found[0] if len(found) == 1 else None


def fuse(atoms: Atoms, labels: Mapping[str, Label]) -> dict[str, Label]:
    """Join atoms that depend on each other where they stand side by side; elsewhere let the outer one go first."""
    labels = dict(labels)
    while (pair := _mutual(atoms, labels)) is not None:
        outer, inner = pair
        if _adjacent(atoms, labels.values(), outer, inner):
            joint = atoms.fuse(outer, inner)
            labels = {name: _fused(label, outer, inner, joint) for name, label in labels.items()}
        else:
            atoms.restrict({outer: atoms[outer].parents - {inner}})
    return labels


def _mutual(atoms: Atoms, labels: Mapping[str, Label]) -> tuple[int, int] | None:
    """Two atoms that depend on each other, the one with the larger stride first; neighbours if there are any."""
    found = None
    for label in labels.values():
        for box in label.boxes:
            for place, index in enumerate(box.indices):
                for later, other in enumerate(box.indices[place + 1 :], place + 1):
                    if other.atom in atoms[index.atom].parents and index.atom in atoms[other.atom].parents:
                        if later == place + 1 and _adjacent(atoms, labels.values(), index.atom, other.atom):
                            return index.atom, other.atom
                        found = found or (index.atom, other.atom)
    return found


def _adjacent(atoms: Atoms, labels: Iterable[Label], outer: int, inner: int) -> bool:
    size = atoms[inner].size
    for label in labels:
        for box in label.boxes:
            for at, index in enumerate(box.indices):
                if index.atom == outer:
                    after = box.indices[at + 1] if at + 1 < len(box.indices) else None
                    if after is None or after[:3] != (index.axis, index.stride // size, inner):
                        return False
                    if index.stride % size:
                        return False
                elif index.atom == inner and (at == 0 or box.indices[at - 1].atom != outer):
                    return False
    return True


def _fused(label: Label, outer: int, inner: int, joint: int) -> Label:
    boxes = [
        box._replace(
            indices=tuple(
                index._replace(atom=joint) if index.atom == inner else index
                for index in box.indices
                if index.atom != outer
            )
        )
        for box in label.boxes
    ]
    return label._replace(boxes=tuple(boxes))


# -- naming ------------------------------------------------------------------------------------------------


class Namer:
    """Names and ``within`` of the groups of live atoms, in the order of the forward pass."""

    def __init__(self, atoms: Atoms, numbers: Sequence[int]) -> None:
        self.atoms = atoms
        self.rank = {number: place for place, number in enumerate(numbers)}
        counts: dict[str, int] = {}
        self.names: dict[int, str] = {}
        for number in numbers:
            kind = self._kind(number)
            self.names[number] = f"{kind}{counts.setdefault(kind, 0)}"
            counts[kind] += 1

    def _kind(self, number: int) -> str:
        atom = self.atoms[number]
        if atom.heads:
            return "heads"
        if any(child in self.rank for child in atom.children):
            return "blocks"
        return "features" if atom.parents else "hidden"

    def within(self, number: int) -> list[int]:
        """Atoms of the outer groups, outermost first."""
        return sorted(self.atoms[number].parents, key=lambda p: (len(self.atoms[p].parents), self.rank[p]))

    def group(self, number: int) -> Group:
        """The group of a live atom."""
        atom = self.atoms[number]
        outer = tuple(self.names[parent] for parent in self.within(number))
        return Group(self.names[number], atom.size, outer, atom.activation)


# -- cells -------------------------------------------------------------------------------------------------


Behaviour = Callable[[Power], object]


def tensor_cells(
    label: Label, namer: Namer, behaviour: Behaviour = lambda power: None
) -> list[tuple[Cell, list[int | None]]]:
    """The cells of a settled label, and the unknown of each dim (None for fixed ones)."""
    scale = row_major(label.shape)
    cells = []
    for box in _joined(label, namer, behaviour):
        box = box._replace(indices=_contiguous(box.indices, namer))
        dims: list[Dim] = []
        behind: list[int | None] = []
        for index in box.indices:
            group = namer.names.get(index.atom)
            parents: tuple[int, ...] = ()
            if group is not None:
                bound = [_binding(box, index, parent) for parent in namer.within(index.atom)]
                parents = tuple(at for at in bound if at is not None)
            stride = index.stride * scale[index.axis]
            dims.append(Dim(index.axis, stride, namer.atoms[index.atom].size, group, parents))
            behind.append(index.power[0][0] if group is not None and index.power else None)
        offset = sum(at * step for at, step in zip(box.offsets, scale, strict=True))
        cells.append((Cell(tuple(dims), offset), behind))
    return sorted(cells, key=lambda cell: cell[0].offset)


def _contiguous(indices: Sequence[Index], namer: Namer) -> tuple[Index, ...]:
    """Sorted, with neighbouring fixed indices of one axis as one."""
    atoms = namer.atoms
    kept: list[Index] = []
    for index in sorted(indices, key=lambda i: (i.axis, -i.stride)):
        last = kept[-1] if kept else None
        fixed = index.atom not in namer.names and last is not None and last.atom not in namer.names
        size = atoms[index.atom].size
        if fixed and last is not None and last[:2] == (index.axis, index.stride * size):
            index = index._replace(atom=atoms.fresh(size * atoms[kept.pop().atom].size, (), "fixed"))
        kept.append(index)
    return tuple(kept)


def _joined(label: Label, namer: Namer, behaviour: Behaviour) -> list[Box]:
    """As few boxes as can be: those that differ only in where they stand on an axis become one."""
    boxes = list(label.boxes)
    before = len(boxes) + 1
    while len(boxes) < before:
        before = len(boxes)
        for axis in range(len(label.shape)):
            boxes = _joined_along(boxes, axis, namer, behaviour)
    return boxes


def _joined_along(boxes: Sequence[Box], axis: int, namer: Namer, behaviour: Behaviour) -> list[Box]:
    alike: dict[object, list[Box]] = {}
    for box in boxes:
        live = tuple(
            _key(i, namer, behaviour) for i in box.indices if i.axis == axis and i.atom in namer.names
        )
        fixed = [i for i in box.indices if i.axis == axis and i.atom not in namer.names]
        # beside live indices a fixed one keeps its place; without any, only the positions matter
        own: object = (live, tuple(_key(i, namer, behaviour) for i in fixed)) if live else "fixed"
        rest = tuple(_key(i, namer, behaviour) for i in box.indices if i.axis != axis)
        offsets = (*box.offsets[:axis], *box.offsets[axis + 1 :])
        alike.setdefault((own, rest, offsets), []).append(box)
    return [box for group in alike.values() for box in _merged(group, axis, namer)]


def _key(index: Index, namer: Namer, behaviour: Behaviour) -> tuple[object, ...]:
    """What two indices share when cells may be joined across them."""
    if index.atom in namer.names:
        return (index.axis, index.stride, index.atom, behaviour(index.power))
    return (index.axis, index.stride, namer.atoms[index.atom].size)


def _merged(boxes: Sequence[Box], axis: int, namer: Namer) -> list[Box]:
    """Boxes that differ in their positions on one axis, as one if the positions are evenly spaced."""
    first = boxes[0]
    on_axis = [i for i in first.indices if i.axis == axis]
    if any(i.atom in namer.names for i in on_axis):
        positions, kept = sorted(box.offsets[axis] for box in boxes), first.indices
    else:
        positions = sorted(at for box in boxes for at in _positions(box, axis, namer.atoms))
        kept = tuple(i for i in first.indices if i.axis != axis)
        on_axis = []
    steps = {after - before for before, after in pairwise(positions)}
    if (len(boxes) == 1 and len(first.indices) - len(kept) < 2) or len(steps) != 1:
        return list(boxes)
    extra = Index(axis, steps.pop(), namer.atoms.fresh(len(positions), (), "fixed"))
    if any(i.stride == extra.stride for i in on_axis):
        return list(boxes)
    start = min(boxes, key=lambda box: box.offsets[axis])
    return [Box(start.offsets, (*kept, extra))]


def _positions(box: Box, axis: int, atoms: Atoms) -> list[int]:
    places = [box.offsets[axis]]
    for index in box.indices:
        if index.axis == axis:
            places = [at + step * index.stride for at in places for step in range(atoms[index.atom].size)]
    return places


# -- the spec ----------------------------------------------------------------------------------------------


def build_spec(
    trace: Trace,
    solutions: Sequence[Solution],
    statistics: Iterable[str],
    aliases: Mapping[str, Sequence[str]],
    constants: Mapping[str, tuple[int, ...]],
    inputs: Sequence[str],
) -> tuple[WeightSpec, Namer]:
    """The spec that the atoms of a settled trace describe, and the names of its groups."""
    atoms = trace.atoms
    labels = fuse(atoms, trace.parameters)
    live = {number for label in labels.values() for number in trace.numbers(label) if atoms.is_live(number)}
    namer = Namer(atoms, _ordered(trace, labels, live))
    moving = set(statistics)
    behaviour = _behaviour(solutions)
    tensors: dict[str, TensorSpec] = {}
    places: list[tuple[int, Exponent]] = []
    for name, label in labels.items():
        cells = tensor_cells(label, namer, behaviour)
        kind: TensorKind = "statistic" if name in moving else "parameter"
        tensors[name] = TensorSpec(
            label.shape, tuple(cell for cell, _ in cells), kind, tuple(aliases.get(name, ()))
        )
        places += [
            (unknown, Exponent(name, number, dim))
            for number, (_, behind) in enumerate(cells)
            for dim, unknown in enumerate(behind)
            if unknown is not None
        ]
    pinned = {name: _reasons(trace, label) for name, label in labels.items()}
    spec = WeightSpec.build(
        [namer.group(number) for number in namer.rank],
        tensors,
        _scalings(solutions, namer, places, tensors),
        constants,
        Provenance(tuple(inputs), Frozen(pinned)),
    )
    return spec, namer


def _ordered(trace: Trace, labels: Mapping[str, Label], live: set[int]) -> list[int]:
    """Live atoms in the order of the forward pass."""
    seen = (trace.atoms.final(number) for number in trace.order)
    rest = (number for label in labels.values() for number in trace.numbers(label))
    return list(dict.fromkeys(number for number in (*seen, *rest) if number in live))


def _behaviour(solutions: Sequence[Solution]) -> Callable[[Power], object]:
    """What all scalings do where an unknown stands: cells where they differ are not joined."""

    def powers(power: Power) -> object:
        return tuple(solution.powers.get(power[0][0], 0) for solution in solutions) if power else None

    return powers


def _scalings(
    solutions: Sequence[Solution],
    namer: Namer,
    places: Sequence[tuple[int, Exponent]],
    tensors: Mapping[str, TensorSpec],
) -> list[Scaling]:
    counts: dict[str, int] = {}
    found = []
    final = [(namer.atoms.final(solution.atom), solution) for solution in solutions]
    for atom, solution in sorted(final, key=lambda pair: namer.rank.get(pair[0], -1)):
        exponents = tuple(
            replace(place, power=solution.powers[at]) for at, place in places if solution.powers.get(at)
        )
        group = namer.names.get(atom)
        if group is None or not exponents:
            continue
        base = f"{solution.kind}({group})"
        counts[base] = counts.get(base, 0) + 1
        name = base if counts[base] == 1 else f"{base[:-1]}, {counts[base]})"
        shifts: tuple[Exponent, ...] = ()
        step = 0.0
        if solution.shift is not None:
            shifts = _everywhere(solution.shift.tensor, tensors, group)
            step = phase_step(solution.shift)
        found.append(Scaling(name, group, solution.kind, exponents, shifts, step))
    return found


def _everywhere(tensor: str, tensors: Mapping[str, TensorSpec], group: str) -> tuple[Exponent, ...]:
    return tuple(
        Exponent(tensor, number, at)
        for number, cell in enumerate(tensors[tensor].cells)
        for at, dim in enumerate(cell.dims)
        if dim.group == group
    )


def _reasons(trace: Trace, label: Label) -> tuple[str, ...]:
    """Per axis, why units on it cannot move; "" where all can."""
    found: list[dict[str, None]] = [{} for _ in label.shape]
    for box in label.boxes:
        for index in box.indices:
            reason = trace.atoms[index.atom].pinned
            if reason:
                found[index.axis][reason] = None
    return tuple("; ".join(reasons) for reasons in found)
