"""What operators do to labels, in terms of a few moves: products, sums, broadcasting, cutting, joining."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from weightspace.spec.tracing._labels import Box, Index, Label, Labels, Pair
from weightspace.spec.tracing._powers import plus

Combine = Literal["add", "multiply"]


def pointwise(t: Labels, operands: Sequence[Label], combine: Combine) -> Label:
    """Combine values entry by entry, with broadcasting; they agree, jointly, on the axes that they share."""
    rank = max(len(label.shape) for label in operands)
    zeros = [label.zero for label in operands]
    result, *others = (_padded(t, t.loose(label), rank) for label in operands)
    for place, other in enumerate(others, 1):
        shared = [axis for axis in range(rank) if result.shape[axis] > 1 and other.shape[axis] > 1]
        result, other, pairs = t.unify(result, other, [(axis, axis) for axis in shared])
        for label in (result, other):
            t.scope(label, shared, shared)
        result, other = t.resolve(result), t.resolve(other)
        if combine == "add":
            t.equal(pairs)
            for label, to_zero in ((result, zeros[place]), (other, all(zeros[:place]))):
                if not to_zero:
                    t.vanish(i.power for box in label.boxes for i in box.indices if i.axis not in shared)
        result = _joined(t, result, other, shared, combine)
    return result


def _padded(t: Labels, label: Label, rank: int) -> Label:
    missing = rank - len(label.shape)
    if not missing:
        return label
    return t.reaxis(label, [*[None] * missing, *range(len(label.shape))], (*[1] * missing, *label.shape))


def _joined(t: Labels, a: Label, b: Label, shared: Sequence[int], combine: Combine) -> Label:
    """One box for every two that agree on the shared axes; each has an index on the axes of its own."""
    shape = tuple(max(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    boxes: dict[Box, None] = {}
    for first in a.boxes:
        for second in b.boxes:
            if t.overlap(first, second, shared):
                boxes[_join(t, first, second, shared, combine)] = None
    return Label(shape, tuple(boxes))


def _join(t: Labels, first: Box, second: Box, shared: Sequence[int], combine: Combine) -> Box:
    indices = [i for i in second.indices if i.axis not in shared]
    partner = {(i.axis, i.stride): i for i in second.indices}
    runs = {axis: run for axis in shared if (run := t.common_run(first, second, axis)) is not None}
    for index in first.indices:
        if index.axis in runs:
            continue
        other = partner.get((index.axis, index.stride))
        if combine == "multiply" and index.axis in shared and other is not None:
            index = index._replace(power=plus(index.power, other.power))
        indices.append(index)
    offsets = [max(x, y) for x, y in zip(first.offsets, second.offsets, strict=True)]
    for axis, (start, fixed) in runs.items():
        offsets[axis] = start
        indices.extend(fixed)
    return Box(tuple(offsets), tuple(sorted(indices, key=lambda i: (i.axis, -i.stride))))


def einsum(t: Labels, equation: str, first: Label, second: Label) -> Label:
    """A product of two values, summed over the letters that the output lacks: ``"bnc,oc->bno"``.

    An axis of size 1 broadcasts. What is summed may depend on batch axes and on what else is summed; a free
    axis on batch axes and on its operand's other free axes; a batch axis on batch axes alone.
    """
    inputs, out = equation.split("->")
    letters = tuple(inputs.split(","))
    operands = [
        _squeezed(t, t.loose(label), names) for label, names in zip((first, second), letters, strict=True)
    ]
    operands = [_alone(t, operands[at], operands[1 - at][1], out) for at in (0, 1)]
    (a, on_a), (b, on_b) = operands
    shared = [name for name in on_a if name in on_b]
    a, b, pairs = t.unify(a, b, [(on_a.index(name), on_b.index(name)) for name in shared])
    summed = [name for name in shared if name not in out]
    t.vanish(plus(x.power, y.power) for x, y in pairs if on_a[x.axis] in summed)
    batch = [name for name in shared if name in out]
    kept = [_contracted(t, label, names, summed, batch) for label, names in ((a, on_a), (b, on_b))]
    left, right = (_placed(t, label, names, out) for label, names in kept)
    return _joined(t, left, right, [out.index(name) for name in batch], "multiply")


def _squeezed(t: Labels, label: Label, names: str) -> tuple[Label, str]:
    axes = [axis for axis, size in enumerate(label.shape) if size > 1]
    return t.reaxis(label, axes, [label.shape[axis] for axis in axes]), "".join(names[axis] for axis in axes)


def _alone(t: Labels, operand: tuple[Label, str], other: str, out: str) -> tuple[Label, str]:
    label, names = operand
    gone = [axis for axis, name in enumerate(names) if name not in other and name not in out]
    if not gone:
        return operand
    return total(t, label, gone), "".join(name for axis, name in enumerate(names) if axis not in gone)


def _contracted(
    t: Labels, label: Label, names: str, summed: Sequence[str], batch: Sequence[str]
) -> tuple[Label, str]:
    axes = {name: axis for axis, name in enumerate(names)}
    on_batch, on_sum = [axes[name] for name in batch], [axes[name] for name in summed]
    free = [axis for name, axis in axes.items() if name not in batch and name not in summed]
    t.scope(label, on_batch, on_batch)
    t.scope(label, on_sum, [*on_batch, *on_sum])
    t.scope(label, free, [*on_batch, *free])
    return t.drop(label, on_sum), "".join(name for name in names if name not in summed)


def _placed(t: Labels, label: Label, names: str, out: str) -> Label:
    places = [names.index(name) if name in names else None for name in out]
    return t.reaxis(label, places, [1 if at is None else label.shape[at] for at in places])


def total(t: Labels, label: Label, axes: Iterable[int]) -> Label:
    """Sum, or average, over axes."""
    gone = set(axes)
    label = t.resolve(label)
    t.vanish(i.power for box in label.boxes for i in box.indices if i.axis in gone)
    return t.drop(label, gone)


def symmetric(t: Labels, label: Label, axes: Iterable[int]) -> Label:
    """The label after something that treats all indices of some axes alike, as a softmax or a norm does."""
    label = t.resolve(label)
    t.drop(label, set(axes))
    return t.resolve(label)._replace(shift=None)


def inhomogeneous(t: Labels, label: Label, axes: Iterable[int] | None = None) -> Label:
    """The label after something under which no scaling along ``axes`` (all by default) survives."""
    if t.powers is None:
        return label._replace(shift=None)
    wanted = range(len(label.shape)) if axes is None else set(axes)
    t.vanish(i.power for box in label.boxes for i in box.indices if i.axis in wanted)
    return label._replace(shift=None, zero=False)


def permute(t: Labels, label: Label, order: Sequence[int]) -> Label:
    """Reorder the axes."""
    rank = len(label.shape)
    order = [axis % rank for axis in order]
    return t.reaxis(label, order, [label.shape[axis] for axis in order])


def transpose(t: Labels, label: Label, first: int, second: int) -> Label:
    """Exchange two axes."""
    rank = len(label.shape)
    order = list(range(rank))
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return permute(t, label, order)


def unsqueeze(t: Labels, label: Label, axis: int) -> Label:
    """A new axis of size 1."""
    order: list[int | None] = list(range(len(label.shape)))
    order.insert(axis % (len(label.shape) + 1), None)
    return t.reaxis(label, order, [1 if at is None else label.shape[at] for at in order])


def narrow(t: Labels, label: Label, axis: int, start: int, length: int) -> Label:
    """Entries ``start`` to ``start + length`` of an axis."""
    label = t.resolve(label)
    shape = tuple(length if at == axis else size for at, size in enumerate(label.shape))
    if length == label.shape[axis]:
        return label
    if t.is_plain(label, [axis]):
        return t.freeze(label, {axis: length})
    while True:
        kept = _within(t, label, axis, start, start + length)
        if kept is not None:
            return label._replace(shape=shape, boxes=tuple(kept))
        label = t.resolve(label)


def _within(t: Labels, label: Label, axis: int, start: int, stop: int) -> list[Box] | None:
    """The boxes within [start, stop), moved to its beginning; None after one had to be cut."""
    kept = []
    for box in label.boxes:
        low, high = t.hull(box, axis)
        if high < start or low >= stop:
            continue
        if low < start or high >= stop:
            _cut_across(t, box, axis, start if low < start else stop)
            return None
        offsets = tuple(at - start if place == axis else at for place, at in enumerate(box.offsets))
        kept.append(box._replace(offsets=offsets))
    return kept


def _cut_across(t: Labels, box: Box, axis: int, position: int) -> None:
    """Cut the index of largest stride where a box crosses a position of an axis."""
    top = next(index for index in box.indices if index.axis == axis)
    low, high = t.hull(box, axis)
    size = t.size(top)
    inner = high - low - (size - 1) * top.stride
    before = sum(low + at * top.stride + inner < position for at in range(size))
    after = sum(low + at * top.stride >= position for at in range(size))
    t.atoms.cut(top.atom, [part for part in (before, size - before - after, after) if part])


def select(t: Labels, label: Label, axis: int, at: int) -> Label:
    """One entry of an axis, which goes away."""
    axis %= len(label.shape)
    label = narrow(t, label, axis, at % label.shape[axis], 1)
    rest = [place for place in range(len(label.shape)) if place != axis]
    return t.reaxis(label, rest, [label.shape[place] for place in rest])


def stride(t: Labels, label: Label, axis: int, step: int, first: int = 0) -> Label:
    """Every ``step``-th entry of an axis whose size is a multiple of it, from ``first`` on."""
    size = label.shape[axis]
    if size % step:
        return t.freeze(label, {axis: len(range(first, size, step))})
    shape = [*label.shape[:axis], size // step, step, *label.shape[axis + 1 :]]
    return select(t, t.reshape(label, shape), axis + 1, first)


def concatenate(t: Labels, labels: Sequence[Label], axis: int) -> Label:
    """One value after the other along an axis."""
    axis %= len(labels[0].shape)
    boxes: list[Box] = []
    start = 0
    for label in labels:
        for box in t.resolve(t.loose(label)).boxes:
            offsets = tuple(at + start if place == axis else at for place, at in enumerate(box.offsets))
            boxes.append(box._replace(offsets=offsets))
        start += label.shape[axis]
    shape = tuple(start if at == axis else size for at, size in enumerate(labels[0].shape))
    return Label(shape, tuple(boxes))


def spread(t: Labels, label: Label, shape: Sequence[int]) -> Label:
    """Broadcast to a shape with as many axes or more."""
    return t.expand(_padded(t, label, len(shape)), shape)


__all__ = [
    "Combine",
    "Index",
    "Pair",
    "concatenate",
    "einsum",
    "inhomogeneous",
    "narrow",
    "permute",
    "pointwise",
    "select",
    "spread",
    "stride",
    "symmetric",
    "total",
    "transpose",
    "unsqueeze",
]
