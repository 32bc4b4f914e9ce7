"""Operators that change shapes and order of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._trace import UNIFORM, Trace, rule
from weightspace.spec.tracing.rules._axes import filled_out


@rule("view", "_unsafe_view")
def view(t: Trace, x: Label, *_: Any) -> Label:
    """The same elements in row-major order."""
    return t.reshape(x, t.shape)


@rule("permute")
def permute(t: Trace, x: Label, order: Sequence[int]) -> Label:
    """Reorder the axes."""
    return op.permute(t, x, order)


@rule("transpose")
def transpose(t: Trace, x: Label, first: int, second: int) -> Label:
    """Exchange two axes."""
    return op.transpose(t, x, first, second)


@rule("t")
def last_two(t: Trace, x: Label) -> Label:
    """Transpose a matrix."""
    return op.transpose(t, x, -2, -1) if len(x.shape) > 1 else x


@rule("unsqueeze")
def unsqueeze(t: Trace, x: Label, axis: int) -> Label:
    """A new axis of size 1."""
    return op.unsqueeze(t, x, axis)


@rule("squeeze")
def squeeze(t: Trace, x: Label, *_: Any) -> Label:
    """Axes of size 1 go away."""
    return t.reshape(x, t.shape)


@rule("expand")
def expand(t: Trace, x: Label, *_: Any) -> Label:
    """Repeat along axes of size 1."""
    return op.spread(t, x, t.shape)


@rule("repeat", "tile")
def repeat(t: Trace, x: Label, times_: Sequence[int]) -> Label:
    """Copies of the whole along axes: the copy is an outer index."""
    rank = len(t.shape)
    x = t.reaxis(
        x, [*[None] * (rank - len(x.shape)), *range(len(x.shape))], [*[1] * (rank - len(x.shape)), *x.shape]
    )
    paired = [part for size, new in zip(x.shape, t.shape, strict=True) for part in (new // size, size)]
    single = [part for size in x.shape for part in (1, size)]
    return t.reshape(op.spread(t, t.reshape(x, single), paired), t.shape)


@rule("repeat_interleave")
def repeat_interleave(t: Trace, x: Label, count: Any, axis: Any = None, *_: Any) -> Label:
    """Copies of each entry: the copy is an inner index."""
    if axis is None:
        x, axis = t.reshape(x, [math.prod(x.shape)]), 0
    axis %= len(x.shape)
    if isinstance(count, Label):
        t.pin(count)
        return t.freeze(x, {axis: t.shape[axis]})
    repeated = [*x.shape[: axis + 1], count, *x.shape[axis + 1 :]]
    return t.reshape(op.spread(t, op.unsqueeze(t, x, axis + 1), repeated), t.shape)


@rule("slice")
def slice_axis(
    t: Trace, x: Label, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Label:
    """A range of an axis; a step takes it apart as a product first."""
    axis %= len(x.shape)
    first, end, step = slice(start, stop, step).indices(x.shape[axis])
    if step == 1:
        return op.narrow(t, x, axis, first, max(end - first, 0))
    if first < step and end > x.shape[axis] - step:
        return op.stride(t, x, axis, step, first)
    return t.freeze(x, {axis: t.shape[axis]})


@rule("select")
def select(t: Trace, x: Label, axis: int, at: int) -> Label:
    """One entry of an axis."""
    return op.select(t, x, axis, at)


@rule("split", "split_with_sizes", "unsafe_split")
def split(t: Trace, x: Label, _: Any, axis: int = 0) -> list[Label]:
    """Consecutive parts of an axis; a bias is no longer that of one of them alone."""
    x, axis = x._replace(shift=None), axis % len(x.shape)
    sizes = [shape[axis] for shape in t.shapes]
    return [op.narrow(t, x, axis, sum(sizes[:at]), size) for at, size in enumerate(sizes)]


@rule("unbind")
def unbind(t: Trace, x: Label, axis: int = 0) -> list[Label]:
    """Every entry of an axis by itself; a bias is no longer that of one of them alone."""
    x = x._replace(shift=None)
    return [op.select(t, x, axis, at) for at in range(x.shape[axis])]


@rule("cat", "concat", "concatenate")
def concatenate(t: Trace, parts: Sequence[Label], axis: int = 0) -> Label:
    """One value after the other; each keeps its own units."""
    parts = [part for part in parts if math.prod(part.shape)]
    return op.concatenate(t, parts, axis)


@rule("stack")
def stack(t: Trace, parts: Sequence[Label], axis: int = 0) -> Label:
    """One value after the other along a new axis."""
    axis %= len(t.shape)
    return op.concatenate(t, [op.unsqueeze(t, part, axis) for part in parts], axis)


# what repeats a fixed value has indices of its own, which are free
UNIFORM.update((expand, repeat, repeat_interleave))


@rule("unfold")
def windows(t: Trace, x: Label, axis: int, *_: Any) -> Label:
    """Runs of an axis, which is fixed, along a new last one."""
    return filled_out(t, op.unsqueeze(t, t.freeze(x, {axis % len(x.shape): t.shape[axis]}), len(x.shape)))
