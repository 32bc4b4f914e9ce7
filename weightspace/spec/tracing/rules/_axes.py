"""What rules do with axes: count them, take them away, give them back as fixed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._trace import Trace


def counted_axes(x: Label, axes: Any) -> list[int]:
    """Axes counted from the front; all of them where an overload of the operator takes none."""
    rank = len(x.shape)
    if isinstance(axes, int) and not isinstance(axes, bool):
        axes = [axes]
    return [axis % rank for axis in (axes if isinstance(axes, Sequence) and axes else range(rank))]


def without(t: Trace, x: Label, axes: Sequence[int], keep: bool) -> Label:
    """Take away axes that a reduction has used, or leave them with size 1."""
    rest = [axis for axis in range(len(x.shape)) if axis not in axes]
    dropped = t.drop(x, axes)
    if not keep:
        return dropped
    places = [rest.index(axis) if axis in rest else None for axis in range(len(x.shape))]
    return t.reaxis(dropped, places, [1 if at is None else dropped.shape[at] for at in places])


def and_positions(t: Trace, values: Label) -> tuple[Label, Label]:
    """Two outputs, the second of which does not scale."""
    return values, t.with_powers(values, lambda form: ())


def filled_out(t: Trace, label: Label) -> Label:
    """Grow axes of size 1 to the operator's output, as fixed ones."""
    return t.freeze(label, {axis: size for axis, size in enumerate(t.shape) if size != label.shape[axis]})
