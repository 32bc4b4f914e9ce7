"""Sums, orders and norms over axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._powers import times
from weightspace.spec.tracing._trace import Trace, rule
from weightspace.spec.tracing.rules._axes import and_positions, counted_axes, filled_out, without
from weightspace.spec.tracing.rules._pointwise import add
from weightspace.spec.tracing.rules._unary import note_activation, scaled


@rule("sum", "mean", "nansum")
def reduce_sum(t: Trace, x: Label, axes: Any = None, *_: Any) -> Label:
    """A sum needs that nothing along its axes scales."""
    over = counted_axes(x, axes)
    t.vanish(i.power for box in t.resolve(x).boxes for i in box.indices if i.axis in over)
    return without(t, x, over, len(t.shape) == len(x.shape))


# what else a reduction does to the powers of the axes that stay
_REDUCED: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("amax", "amin", "max", "min", "median"), ("keep", None)),
    **dict.fromkeys(("any", "all"), ("forget", "even")),
    "std": ("keep", "even"),
    "var": ("double", "even"),
    "logsumexp": (None, None),
}


@rule("amax", "amin", "logsumexp", "any", "all", "std", "var", "std_mean", "var_mean")
def reduce_other(t: Trace, x: Label, axes: Any = None, *_: Any) -> Any:
    """Symmetric over its axes, but not linear."""
    over = counted_axes(x, axes)
    name, *mean = t.name.split("_")
    x = scaled(t, x, "forget", "even") if name in ("any", "all") else op.inhomogeneous(t, x, over)
    reduced = without(t, x, over, len(t.shape) == len(x.shape))
    value = scaled(t, reduced, *_REDUCED[name])
    return (value, reduced) if mean else value


@rule("prod")
def reduce_product(t: Trace, x: Label, axes: Any = None, *_: Any) -> Label:
    """What scales all factors alike is taken to the power of their number."""
    over = counted_axes(x, axes)
    count = math.prod(x.shape[axis] for axis in over)
    reduced = without(t, op.inhomogeneous(t, x, over), over, len(t.shape) == len(x.shape))
    return t.with_powers(reduced, lambda form: times(form, count))


def _ranked(t: Trace, x: Label, axis: int) -> Label:
    """What compares entries along an axis: it is fixed once somebody looks at positions."""
    x = op.inhomogeneous(t, x, [axis] if t.powers == "positive" else None)
    return t.pin(x, [axis]) if t.is_used(1) else x


@rule("max", "min", "median", "mode", "kthvalue")
def pick(t: Trace, x: Label, *arguments: Any) -> Any:
    """An entry along an axis that its rank picks, and where it is."""
    if arguments and isinstance(arguments[0], Label):
        return add(t, x, arguments[0])
    if len(t.shapes) == 1:
        return reduce_other(t, x)
    (axis,) = counted_axes(x, arguments[t.name == "kthvalue"])
    values = without(t, _ranked(t, x, axis), [axis], len(t.shape) == len(x.shape))
    return and_positions(t, values)


@rule("argmax", "argmin")
def arg(t: Trace, x: Label, axis: Any = None, *_: Any) -> Label:
    """Positions along an axis: it may not move."""
    over = counted_axes(x, axis)
    reduced = without(t, op.inhomogeneous(t, t.pin(x, over), over), over, len(t.shape) == len(x.shape))
    return scaled(t, reduced, "forget", None)


@rule("sort", "topk")
def sort(t: Trace, x: Label, *arguments: Any) -> tuple[Label, Label]:
    """Sorted values have lost the index of their axis; the positions, once used, pin it."""
    whole = [value for value in arguments if isinstance(value, int) and not isinstance(value, bool)]
    (axis,) = counted_axes(x, whole[t.name == "topk"])
    return and_positions(t, filled_out(t, without(t, _ranked(t, x, axis), [axis], keep=True)))


@rule("softmax", "log_softmax")
def softmax(t: Trace, x: Label, axis: int, *_: Any) -> Label:
    """Symmetric along its axis; one head for each index of the axes before the last two."""
    (axis,) = counted_axes(x, axis)
    t.note_heads(x, axis)
    note_activation(t, x, t.name, [axis])
    return op.symmetric(t, op.inhomogeneous(t, x), [axis])


@rule("linalg_vector_norm", "norm")
def vector_norm(t: Trace, x: Label, order: Any = 2, axes: Any = None, keep: bool = False, *_: Any) -> Label:
    """A norm over axes: positive factors of the others stay, signs are lost; of order 0, factors too."""
    over = counted_axes(x, axes)
    if t.powers == "positive" and order != 0:
        return without(t, op.inhomogeneous(t, x, over), over, keep)
    return without(t, t.with_powers(x, lambda form: ()), over, keep)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(t: Trace, x: Label, axes: Sequence[int], *_: Any) -> Label:
    """Linear; the axes that it transforms are fixed."""
    return t.freeze(x, {axis: t.shape[axis] for axis in counted_axes(x, axes)})._replace(shift=None)


@rule("cumsum", "cumprod", "logcumsumexp", "flip", "roll", "cummax", "cummin")
def ordered(t: Trace, x: Label, axes: Any, more: Any = None, *_: Any) -> Any:
    """The order along some axes matters: they are fixed."""
    which = counted_axes(x, more if t.name == "roll" else axes)
    kept = t.freeze(x, {axis: x.shape[axis] for axis in which})
    if t.name in ("cumprod", "logcumsumexp") or (t.name in ("cummax", "cummin") and t.powers == "sign"):
        kept = op.inhomogeneous(t, kept)
    return and_positions(t, kept) if len(t.shapes) == 2 else kept
