"""Operators that work entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._powers import times
from weightspace.spec.tracing._trace import Trace, rule
from weightspace.spec.tracing.rules._axes import filled_out, without
from weightspace.spec.tracing.rules._unary import note_activation, scaled


@rule("sin", "cos")
def sine(t: Trace, x: Label) -> Label:
    """Odd (even) in its argument; and a shift by half a period changes the sign: the phase symmetry."""
    name = t.name
    note_activation(t, x, "sine" if name == "sin" else "cosine")
    shift = x.shift
    x = scaled(t, x, None, "keep" if name == "sin" else "even")
    return x if shift is None else t.flipped(x, shift)


@rule("alias", "clone", "detach", "_to_copy", "native_dropout", "_conj", "_neg_view")
def same(t: Trace, x: Label, dtype: Any = None, *_: Any) -> Any:
    """Changes neither shape nor values but by rounding to integers, towards 0, to truth values, or by signs."""
    if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
        x = scaled(t, x, *(("forget", "even") if dtype == torch.bool else (None, "keep")))
    return (x, t.fixed(x.shape)) if len(t.shapes) == 2 else x


@rule("clamp", "clamp_min", "clamp_max", "hardtanh", "clip")
def clamp(t: Trace, x: Label, low: Any = None, high: Any = None, *_: Any) -> Label:
    """ReLU when it only cuts at 0; odd when it cuts symmetrically."""
    if t.name == "clamp_max":
        low, high = None, low
    if isinstance(low, Label) or isinstance(high, Label):
        return _alike(t, (x, low, high), t.powers == "positive")
    is_relu = (low == 0 and high is None) or (high == 0 and low is None)
    if t.name != "hardtanh" and is_relu:
        note_activation(t, x, "relu")
        return scaled(t, x, "keep", None)
    note_activation(t, x, "hardtanh")
    return scaled(t, x, None, "keep" if low is not None and high is not None and low == -high else None)


@rule("threshold")
def threshold(t: Trace, x: Label, at: float, value: float) -> Label:
    """A constant in place of what is not above a threshold: ReLU if both are 0."""
    if at == value == 0:
        note_activation(t, x, "relu")
        return scaled(t, x, "keep", None)
    return op.inhomogeneous(t, x)


@rule("nan_to_num")
def nan_to_num(t: Trace, x: Label, nan: float | None = None, *_: Any) -> Label:
    """Finite values stay what they are."""
    return scaled(t, x, "keep", "keep") if not nan else op.inhomogeneous(t, x)


@rule("pow")
def power(t: Trace, x: Any, exponent: Any) -> Label:
    """An even or odd integer power; other powers keep nothing."""
    if not isinstance(x, Label) or not isinstance(exponent, int | float):
        operands = [op.inhomogeneous(t, part) for part in (x, exponent) if isinstance(part, Label)]
        return op.pointwise(t, operands, "add")
    factor = t.fraction(exponent)
    if float(factor) == exponent and (t.powers == "positive" or factor.denominator == 1):
        return t.with_powers(x, lambda form: times(form, factor))._replace(shift=None, zero=False)
    return op.inhomogeneous(t, x)


@rule("prelu")
def prelu(t: Trace, x: Label, weight: Label) -> Label:
    """A slope per channel, axis 1, or one for all."""
    note_activation(t, x, "prelu")
    if len(weight.shape) == 1 and len(x.shape) > 1:
        weight = t.reshape(weight, [1, *weight.shape, *[1] * (len(x.shape) - 2)])
    if t.powers == "sign":
        x = op.inhomogeneous(t, x)
    return op.pointwise(t, [x, op.inhomogeneous(t, weight)], "multiply")


@rule("glu")
def glu(t: Trace, x: Label, axis: int) -> Label:
    """The first half of an axis, gated by the sigmoid of the second."""
    half = x.shape[axis] // 2
    value, gate = (op.narrow(t, t.resolve(x), axis % len(x.shape), start, half) for start in (0, half))
    note_activation(t, gate, "glu")
    return op.pointwise(t, [value, op.inhomogeneous(t, gate)], "multiply")


@rule("add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin", "hypot")
def add(t: Trace, x: Any, y: Any, alpha: Any = 1, *_: Any) -> Label:
    """All operands scale alike; a constant other than 0 scales not at all."""
    operands = [part for part in (x, y, alpha) if isinstance(part, Label)]
    numbers = [part for part in (x, y) if isinstance(part, int | float)]
    plain = t.name in ("add", "sub") and alpha == 1
    if t.powers == "sign" and t.name not in ("add", "sub", "rsub"):
        operands = [scaled(t, part, None, "even" if t.name == "hypot" else None) for part in operands]
    if any(number != 0 for number in numbers):
        shift = operands[0].shift
        return op.inhomogeneous(t, operands[0])._replace(shift=shift if plain else None)
    result = op.pointwise(t, operands, "add")
    shifts = [part.shift for part in reversed(operands) if part.shift is not None]
    return result._replace(shift=shifts[0] if shifts and t.name == "add" and plain else None)


@rule("complex")
def real_and_imaginary(t: Trace, x: Label, y: Label) -> Label:
    """``x + i y``."""
    return op.pointwise(t, [x, y], "add")


@rule("polar")
def polar(t: Trace, size: Label, angle: Label) -> Label:
    """``size * exp(i angle)``."""
    return op.pointwise(t, [size, op.inhomogeneous(t, angle)], "multiply")


@rule("view_as_real")
def view_as_real(t: Trace, x: Label) -> Label:
    """A last axis for the real and the imaginary part."""
    return filled_out(t, op.unsqueeze(t, x, len(x.shape)))


@rule("view_as_complex")
def view_as_complex(t: Trace, x: Label) -> Label:
    """The last axis holds the real and the imaginary part."""
    last = len(x.shape) - 1
    return without(t, t.pin(x, [last]), [last], keep=False)


@rule("lerp")
def lerp(t: Trace, x: Label, y: Label, weight: Any) -> Label:
    """``x + weight * (y - x)``."""
    mixed = op.pointwise(t, [x, y], "add")
    return (
        op.pointwise(t, [mixed, op.inhomogeneous(t, weight)], "multiply")
        if isinstance(weight, Label)
        else mixed
    )


@rule("mul", "div")
def multiply(t: Trace, x: Any, y: Any, *rounding: Any) -> Label:
    """Powers add; dividing subtracts them."""
    if any(part is not None for part in rounding):
        return t.with_powers(_alike(t, (x, y), homogeneous=True), lambda form: ())
    if isinstance(y, Label) and t.name == "div":
        y = t.with_powers(y, lambda form: times(form, t.fraction(-1)))
    operands = [part for part in (x, y) if isinstance(part, Label)]
    if len(operands) == 1 and isinstance(y, int | float):
        (x,) = operands
        shift = x.shift
        factor = 1 / y if t.name == "div" and y else y
        return x._replace(shift=shift._replace(factor=shift.factor * factor) if shift and factor else None)
    return op.pointwise(t, operands, "multiply")._replace(shift=None)


@rule("addcmul", "addcdiv")
def addcmul(t: Trace, x: Label, y: Label, z: Label, value: Any = 1) -> Label:
    """``x + value * y * z`` or ``x + value * y / z``."""
    if t.name == "addcdiv":
        z = t.with_powers(z, lambda form: times(form, t.fraction(-1)))
    return op.pointwise(t, [x, op.pointwise(t, [y, z], "multiply")], "add")


def _alike(t: Trace, operands: Sequence[Any], homogeneous: bool) -> Label:
    """Operands that may scale by what they share, if at all; a constant other than 0 scales not at all."""
    labels = [part for part in operands if isinstance(part, Label)]
    if not homogeneous or any(isinstance(part, int | float) and part != 0 for part in operands):
        labels = [op.inhomogeneous(t, part) for part in labels]
    return op.pointwise(t, labels, "add")


@rule("eq", "ne", "lt", "gt", "le", "ge", "floor_divide", "atan2")
def compare(t: Trace, *operands: Any) -> Label:
    """A factor that both share is lost; order and quadrant change with a common sign."""
    homogeneous = t.powers == "positive" or t.name in ("eq", "ne", "floor_divide")
    return t.with_powers(_alike(t, operands, homogeneous), lambda form: ())


@rule("fmod", "remainder")
def remainder(t: Trace, *operands: Any) -> Label:
    """A factor that both share stays."""
    return _alike(t, operands, homogeneous=True)


@rule("logical_and", "logical_or", "logical_xor")
def truth(t: Trace, *operands: Label) -> Label:
    """Whether entries are 0 does not change when they scale."""
    return op.pointwise(t, [scaled(t, part, "forget", "even") for part in operands], "add")


@rule("bitwise_and", "bitwise_or", "bitwise_xor", "logaddexp", "isclose")
def unlike(t: Trace, *operands: Any) -> Label:
    """No scaling survives."""
    return _alike(t, operands, homogeneous=False)


@rule("copysign")
def copysign(t: Trace, x: Any, y: Any) -> Label:
    """``|x| sign(y)``."""
    parts = [scaled(t, x, "keep", "even")] if isinstance(x, Label) else []
    if isinstance(y, Label):
        parts.append(scaled(t, y, "forget", "keep"))
    return op.pointwise(t, parts, "multiply")


@rule("xlogy", "heaviside")
def product_with_function(t: Trace, x: Any, y: Any) -> Label:
    """``x log(y)``; ``x > 0``, with ``y`` where ``x`` is 0."""
    labels = [op.inhomogeneous(t, y)] if isinstance(y, Label) else []
    if isinstance(x, Label):
        labels.append(x if t.name == "xlogy" else scaled(t, x, "forget", None))
    return op.pointwise(t, labels, "multiply")


@rule("where")
def where(t: Trace, condition: Label, x: Any, y: Any) -> Label:
    """One of two values; neither scales if a constant other than 0 is chosen from."""
    labels = [part for part in (x, y) if isinstance(part, Label)]
    if any(isinstance(part, int | float) and part != 0 for part in (x, y)):
        labels = [op.inhomogeneous(t, part) for part in labels]
    values = [op.pointwise(t, labels, "add")] if labels else []
    return op.pointwise(t, [*values, op.inhomogeneous(t, condition)], "multiply")


@rule("masked_fill")
def masked_fill(t: Trace, x: Label, mask: Label, value: Any) -> Label:
    """Some entries replaced by a constant."""
    if isinstance(value, Label):
        return where(t, mask, value, x)
    zero = isinstance(value, int | float) and value == 0
    return op.pointwise(t, [x if zero else op.inhomogeneous(t, x), op.inhomogeneous(t, mask)], "multiply")
