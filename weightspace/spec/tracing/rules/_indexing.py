"""Operators that read and write by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._trace import UNIFORM, Trace, rule
from weightspace.spec.tracing.rules._axes import filled_out, without
from weightspace.spec.tracing.rules._pointwise import where
from weightspace.spec.tracing.rules._shapes import concatenate
from weightspace.spec.tracing.rules._unary import scaled


@rule("index", "_unsafe_index")
def index(t: Trace, x: Label, places: Sequence[Any]) -> Label:
    """Look up entries by position: the indexed axes are fixed, and the positions' own axes take their place."""
    indexed = [axis for axis, place in enumerate(places) if isinstance(place, Label)]
    rest: list[int | None] = list(range(len(x.shape) - len(indexed)))
    positions = op.pointwise(t, [op.inhomogeneous(t, places[axis]) for axis in indexed], "add")
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    first, new = indexed[0] if together else 0, len(positions.shape)
    kept = without(t, t.pin(x, indexed), indexed, False)
    order = [*rest[:first], *[None] * new, *rest[first:]]
    kept = t.reaxis(kept, order, [1 if at is None else kept.shape[at] for at in order])
    order = [*[None] * first, *range(new), *[None] * len(rest[first:])]
    positions = t.reaxis(positions, order, [1 if at is None else positions.shape[at] for at in order])
    return op.pointwise(t, [kept, positions], "multiply")


@rule("index_select")
def index_select(t: Trace, x: Label, axis: int, positions: Label) -> Label:
    """Look up slices along one axis."""
    return index(t, x, [*[None] * (axis % len(x.shape)), positions])


@rule("gather")
def gather(t: Trace, x: Label, axis: int, positions: Label, *_: Any) -> Label:
    """Look up entries along one axis, which is fixed, everywhere else in the same place."""
    axis %= len(x.shape)
    if not _same_elsewhere(x, positions, axis):
        t.give_up([x, positions])
        return t.fixed(t.shape)
    parts = [t.freeze(part, {axis: t.shape[axis]}) for part in (x, op.inhomogeneous(t, positions))]
    return op.pointwise(t, parts, "multiply")


@rule("index_put")
def index_put(t: Trace, x: Label, places: Sequence[Any], values: Label, *_: Any) -> Label:
    """Store, or add, entries by position: the indexed axes are fixed. A number may go where a mask is true."""
    if _has_mask(t):
        *front, mask = places
        if math.prod(values.shape) == 1 and all(place is None for place in front):
            rank = len(x.shape) - len(front) - len(mask.shape)
            return where(t, t.reshape(mask, [*mask.shape, *[1] * rank]), t.reshape(values, []), x)
        t.give_up([x, values, *(place for place in places if isinstance(place, Label))])
        return t.fixed(t.shape)
    x = t.loose(x)
    indexed = [axis for axis, place in enumerate(places) if isinstance(place, Label)]
    t.give_up(places[axis] for axis in indexed)
    op.pointwise(t, [index(t, x, places), values], "add")
    return t.freeze(x, {axis: x.shape[axis] for axis in indexed})


def _has_mask(t: Trace) -> bool:
    """Whether a position is a truth value for every entry, which stands for as many axes as it has."""
    assert t.node is not None
    places = (place for place in t.node.args[1] if isinstance(place, fx.Node))  # type: ignore[union-attr]
    return any(place.meta["val"].dtype == torch.bool for place in places)


@rule("scatter", "scatter_add")
def scatter(t: Trace, x: Label, axis: int, positions: Label, values: Any, reduce: Any = None) -> Label:
    """Store, or add, entries by position along one axis, which is fixed, everywhere else in the same place."""
    axis %= len(x.shape)
    if reduce is not None and reduce != "add":
        t.give_up(part for part in (x, positions, values) if isinstance(part, Label))
        return t.fixed(t.shape)
    if not isinstance(values, Label):
        x = op.inhomogeneous(t, x) if values else x
        values = t.fresh(positions.shape)._replace(zero=not values)
    parts = [x, values, positions]
    if not all(_same_elsewhere(x, part, axis) for part in parts):
        t.give_up(parts)
        return t.fixed(t.shape)
    x, values, positions = (without(t, t.pin(part, [axis]), [axis], keep=True) for part in parts)
    total = op.pointwise(t, [x, values], "add")
    return filled_out(t, op.pointwise(t, [total, op.inhomogeneous(t, positions)], "multiply"))


@rule("scatter_reduce")
def scatter_reduce(
    t: Trace, x: Label, axis: int, positions: Label, values: Label, reduce: str, include_self: bool = True
) -> Label:
    """Sums, means, extremes or products of entries by position along one axis."""
    if reduce in ("amax", "amin"):
        x, values = (scaled(t, part, "keep", None) for part in (x, values))
    if reduce == "prod":
        x, values = op.inhomogeneous(t, x), op.inhomogeneous(t, values)
    return scatter(t, x, axis, positions, values)


@rule("slice_scatter")
def slice_scatter(
    t: Trace, x: Label, values: Label, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Label:
    """Store a range of an axis."""
    axis, size = axis % len(x.shape), x.shape[axis]
    first, end, step = slice(start, stop, step).indices(size)
    if step > 1:
        return op.pointwise(
            t, [t.pin(x, [axis]), without(t, t.pin(values, [axis]), [axis], keep=True)], "add"
        )
    parts = [op.narrow(t, x, axis, 0, first), values, op.narrow(t, x, axis, end, size - end)]
    return concatenate(t, parts, axis)


@rule("select_scatter")
def select_scatter(t: Trace, x: Label, values: Label, axis: int, at: int) -> Label:
    """Store one entry of an axis."""
    axis, size = axis % len(x.shape), x.shape[axis]
    at %= size
    parts = [
        op.narrow(t, x, axis, 0, at),
        op.unsqueeze(t, values, axis),
        op.narrow(t, x, axis, at + 1, size - at - 1),
    ]
    return concatenate(t, parts, axis)


@rule("copy")
def copy(t: Trace, x: Label, values: Label, *_: Any) -> Label:
    """Overwrite everything."""
    return op.spread(t, values, x.shape)


def _same_elsewhere(x: Label, positions: Label, axis: int) -> bool:
    return all(a == b for at, (a, b) in enumerate(zip(x.shape, positions.shape, strict=True)) if at != axis)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty", "zero",
      "fill")  # fmt: skip
def uniform(t: Trace, _: Any, *arguments: Any) -> Label:
    """The same number everywhere."""
    label = t.fresh(t.shape)
    filled = t.name in ("full_like", "new_full", "fill")
    value = arguments[0 if t.name != "new_full" else 1] if filled else float("zero" not in t.name)
    return label._replace(zero=value == 0)


UNIFORM.add(uniform)


@rule("tril", "triu")
def triangular(t: Trace, x: Label, *_: Any) -> Label:
    """Positions along the last two axes matter: they are fixed."""
    return t.freeze(x, {axis: x.shape[axis] for axis in (len(x.shape) - 2, len(x.shape) - 1)})


@rule("diagonal", "diagonal_copy")
def diagonal(t: Trace, x: Label, offset: int = 0, first: int = 0, second: int = 1) -> Label:
    """Two axes are fixed and become a last one."""
    axes = [axis % len(x.shape) for axis in (first, second)]
    kept = without(t, t.pin(x, axes), axes, keep=False)
    return filled_out(t, op.unsqueeze(t, kept, len(kept.shape)))


@rule("diag_embed")
def diag_embed(t: Trace, x: Label, offset: int = 0, first: int = -2, second: int = -1) -> Label:
    """The last axis is fixed and becomes two."""
    last, rank = len(x.shape) - 1, len(t.shape)
    axes = sorted(axis % rank for axis in (first, second))
    kept = without(t, t.pin(x, [last]), [last], keep=False)
    for axis in axes:
        kept = op.unsqueeze(t, kept, axis)
    return filled_out(t, kept)
