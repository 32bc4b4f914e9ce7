"""One rule per family of ATen operators: how labels, and powers, pass through it.

To add one: write a function of the trace and of the operator's arguments, in the order of its schema, from the
moves in ``_operations.py``; register it by name; and add a module that uses the operator to the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from weightspace.errors import SpecError
from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._powers import times
from weightspace.spec.tracing._program import operator_name
from weightspace.spec.tracing._trace import UNIFORM, Trace, rule

# -- entry by entry, one operand ---------------------------------------------------------------------------

# what a function of one variable does to powers: (positive factors, signs); None where no scaling survives
_UNARY: dict[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("relu", "leaky_relu", "rrelu"), ("keep", None)),
    "abs": ("keep", "even"),
    "square": ("double", "even"),
    "sqrt": ("half", None),
    "rsqrt": ("minus half", None),
    "reciprocal": ("minus", "keep"),
    "sign": ("forget", "keep"),
    "cosh": (None, "even"),
    "neg": ("keep", "keep"),
    **dict.fromkeys(
        (
            "tanh",
            "sin",
            "tan",
            "asin",
            "atan",
            "sinh",
            "asinh",
            "atanh",
            "erf",
            "erfinv",
            "round",
            "trunc",
            "frac",
        ),
        (None, "keep"),
    ),
    **dict.fromkeys(
        ("gelu", "silu", "sigmoid", "elu", "selu", "celu", "mish", "softplus", "log_sigmoid", "hardswish"),
        (None, None),
    ),
    **dict.fromkeys(
        (
            "hardsigmoid",
            "relu6",
            "exp",
            "exp2",
            "expm1",
            "log",
            "log2",
            "log10",
            "log1p",
            "erfc",
        ),
        (None, None),
    ),
    "angle": ("forget", None),
    **dict.fromkeys(("floor", "ceil", "acos", "acosh", "bitwise_not"), (None, None)),
    **dict.fromkeys(("digamma", "lgamma", "logit", "fake_quantize_per_tensor_affine"), (None, None)),
    **dict.fromkeys(("isnan", "isinf", "isfinite", "logical_not"), ("forget", "even")),
}
_FACTORS = {"keep": 1, "double": 2, "half": 0.5, "minus": -1, "minus half": -0.5, "forget": 0}
_SIGNS = {"keep": 1, "even": 0}
_ACTIVATIONS = {
    "relu", "leaky_relu", "prelu", "tanh", "gelu", "silu", "sigmoid", "elu", "selu", "celu", "mish", "softplus",
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "glu", "rrelu", "sine", "gaussian", "cosine",
}  # fmt: skip


def _activation(t: Trace, x: Label, name: str) -> None:
    """Note what the units apply, if nothing is noted yet."""

    def note(atom: Any) -> None:
        atom.activation = atom.activation or name

    if name in _ACTIVATIONS:
        t.atoms.mark((n for n in t.numbers(t.resolve(x)) if t.atoms.is_live(n)), note)


def _scaled(t: Trace, x: Label, positive: str | None, sign: str | None) -> Label:
    """The label of a function of one variable with the given behaviour under factors and signs."""
    powers, behaviour = (_FACTORS, positive) if t.powers == "positive" else (_SIGNS, sign)
    if behaviour is None:
        return op.inhomogeneous(t, x)
    factor = powers[behaviour]
    return t.with_powers(x, lambda power: times(power, t.fraction(factor)))._replace(shift=None, zero=False)


def unary_rule(name: str, positive: str | None = None, sign: str | None = None) -> None:
    """Register a function f of one variable that an operator applies to every entry of its first argument.

    The units of other tensors that it reads are fixed.

    Args:
        name: of the operator, without overload: ``"relu"``, or ``"mylib::softcap"`` for one of your own.
        positive: the power with which a factor c > 0 passes: ``"keep"`` if f(c x) = c f(x), ``"double"`` if it
            is c^2 f(x), ``"half"`` if sqrt(c) f(x), ``"minus"`` if f(x) / c, ``"minus half"`` if
            f(x) / sqrt(c), ``"forget"`` if f(x); None if no factor passes.
        sign: ``"keep"`` if f is odd, ``"even"`` if it is even; None if it is neither.

    Raises:
        SpecError: a word that is none of these, or the operator has a rule already.
    """
    for field, word, words in (("positive", positive, _FACTORS), ("sign", sign, _SIGNS)):
        if word is not None and word not in words:
            raise SpecError(
                f"unary_rule: {field}: expected one of {', '.join(words)} or None, found {word!r}"
            )

    @rule(name)
    def unary(t: Trace, x: Label, *others: Any) -> Label:
        t.give_up(other for other in others if isinstance(other, Label))
        _activation(t, x, _function(t.node, name))
        return _scaled(t, x, positive, sign)


def _function(node: fx.Node | None, name: str) -> str:
    """What units apply, if an operator is only the last step of it."""
    if node is not None and name == "exp" and _reads_power(node, 2, steps=3):
        return "gaussian"
    # the approximation of GELU is tanh of x + c x^3
    return "gelu" if node is not None and name == "tanh" and _reads_power(node, 3, steps=4) else name


def _reads_power(node: fx.Node, exponent: int, steps: int) -> bool:
    """Whether an operator takes an argument to a power, or one a few steps before it does."""
    if operator_name(node) in ("pow", "square"):
        return bool((*node.args, 2)[1] == exponent)
    if operator_name(node) == "mul" and node.args[0] is node.args[1]:
        return exponent == 2
    return steps > 0 and any(_reads_power(source, exponent, steps - 1) for source in node.all_input_nodes)


for _name, (_positive, _sign) in _UNARY.items():
    if _name != "sin":
        unary_rule(_name, _positive, _sign)


@rule("sin", "cos")
def sine(t: Trace, x: Label) -> Label:
    """Odd (even) in its argument; and a shift by half a period changes the sign: the phase symmetry."""
    name = t.name
    _activation(t, x, "sine" if name == "sin" else "cosine")
    shift = x.shift
    x = _scaled(t, x, None, "keep" if name == "sin" else "even")
    return x if shift is None else t.flipped(x, shift)


@rule("alias", "clone", "detach", "_to_copy", "native_dropout", "_conj", "_neg_view")
def same(t: Trace, x: Label, dtype: Any = None, *_: Any) -> Any:
    """Changes neither shape nor values but by rounding to integers, towards 0, to truth values, or by signs."""
    if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
        x = _scaled(t, x, *(("forget", "even") if dtype == torch.bool else (None, "keep")))
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
        _activation(t, x, "relu")
        return _scaled(t, x, "keep", None)
    _activation(t, x, "hardtanh")
    return _scaled(t, x, None, "keep" if low is not None and high is not None and low == -high else None)


@rule("threshold")
def threshold(t: Trace, x: Label, at: float, value: float) -> Label:
    """A constant in place of what is not above a threshold: ReLU if both are 0."""
    if at == value == 0:
        _activation(t, x, "relu")
        return _scaled(t, x, "keep", None)
    return op.inhomogeneous(t, x)


@rule("nan_to_num")
def nan_to_num(t: Trace, x: Label, nan: float | None = None, *_: Any) -> Label:
    """Finite values stay what they are."""
    return _scaled(t, x, "keep", "keep") if not nan else op.inhomogeneous(t, x)


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
    _activation(t, x, "prelu")
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
    _activation(t, gate, "glu")
    return op.pointwise(t, [value, op.inhomogeneous(t, gate)], "multiply")


# -- entry by entry, several operands ----------------------------------------------------------------------


@rule("add", "sub", "rsub", "maximum", "minimum", "fmax", "fmin", "hypot")
def add(t: Trace, x: Any, y: Any, alpha: Any = 1, *_: Any) -> Label:
    """All operands scale alike; a constant other than 0 scales not at all."""
    operands = [part for part in (x, y, alpha) if isinstance(part, Label)]
    numbers = [part for part in (x, y) if isinstance(part, int | float)]
    plain = t.name in ("add", "sub") and alpha == 1
    if t.powers == "sign" and t.name not in ("add", "sub", "rsub"):
        operands = [_scaled(t, part, None, "even" if t.name == "hypot" else None) for part in operands]
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
    return _filled(t, op.unsqueeze(t, x, len(x.shape)))


@rule("view_as_complex")
def view_as_complex(t: Trace, x: Label) -> Label:
    """The last axis holds the real and the imaginary part."""
    last = len(x.shape) - 1
    return _without(t, t.pin(x, [last]), [last], keep=False)


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
    return op.pointwise(t, [_scaled(t, part, "forget", "even") for part in operands], "add")


@rule("bitwise_and", "bitwise_or", "bitwise_xor", "logaddexp", "isclose")
def unlike(t: Trace, *operands: Any) -> Label:
    """No scaling survives."""
    return _alike(t, operands, homogeneous=False)


@rule("copysign")
def copysign(t: Trace, x: Any, y: Any) -> Label:
    """``|x| sign(y)``."""
    parts = [_scaled(t, x, "keep", "even")] if isinstance(x, Label) else []
    if isinstance(y, Label):
        parts.append(_scaled(t, y, "forget", "keep"))
    return op.pointwise(t, parts, "multiply")


@rule("xlogy", "heaviside")
def product_with_function(t: Trace, x: Any, y: Any) -> Label:
    """``x log(y)``; ``x > 0``, with ``y`` where ``x`` is 0."""
    labels = [op.inhomogeneous(t, y)] if isinstance(y, Label) else []
    if isinstance(x, Label):
        labels.append(x if t.name == "xlogy" else _scaled(t, x, "forget", None))
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


# -- sums and orders over axes -----------------------------------------------------------------------------


def _axes(x: Label, axes: Any) -> list[int]:
    """Axes counted from the front; all of them where an overload of the operator takes none."""
    rank = len(x.shape)
    if isinstance(axes, int) and not isinstance(axes, bool):
        axes = [axes]
    return [axis % rank for axis in (axes if isinstance(axes, Sequence) and axes else range(rank))]


def _without(t: Trace, x: Label, axes: Sequence[int], keep: bool) -> Label:
    """Take away axes that a reduction has used, or leave them with size 1."""
    rest = [axis for axis in range(len(x.shape)) if axis not in axes]
    dropped = t.drop(x, axes)
    if not keep:
        return dropped
    places = [rest.index(axis) if axis in rest else None for axis in range(len(x.shape))]
    return t.reaxis(dropped, places, [1 if at is None else dropped.shape[at] for at in places])


@rule("sum", "mean", "nansum")
def reduce_sum(t: Trace, x: Label, axes: Any = None, *_: Any) -> Label:
    """A sum needs that nothing along its axes scales."""
    over = _axes(x, axes)
    t.vanish(i.power for box in t.resolve(x).boxes for i in box.indices if i.axis in over)
    return _without(t, x, over, len(t.shape) == len(x.shape))


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
    over = _axes(x, axes)
    name, *mean = t.name.split("_")
    x = _scaled(t, x, "forget", "even") if name in ("any", "all") else op.inhomogeneous(t, x, over)
    reduced = _without(t, x, over, len(t.shape) == len(x.shape))
    value = _scaled(t, reduced, *_REDUCED[name])
    return (value, reduced) if mean else value


@rule("prod")
def reduce_product(t: Trace, x: Label, axes: Any = None, *_: Any) -> Label:
    """What scales all factors alike is taken to the power of their number."""
    over = _axes(x, axes)
    count = math.prod(x.shape[axis] for axis in over)
    reduced = _without(t, op.inhomogeneous(t, x, over), over, len(t.shape) == len(x.shape))
    return t.with_powers(reduced, lambda form: times(form, count))


def _ranked(t: Trace, x: Label, axis: int) -> Label:
    """What compares entries along an axis: it is fixed once somebody looks at positions."""
    x = op.inhomogeneous(t, x, [axis] if t.powers == "positive" else None)
    return t.pin(x, [axis]) if t.is_used(1) else x


def _and_positions(t: Trace, values: Label) -> tuple[Label, Label]:
    """Two outputs, the second of which does not scale."""
    return values, t.with_powers(values, lambda form: ())


@rule("max", "min", "median", "mode", "kthvalue")
def pick(t: Trace, x: Label, *arguments: Any) -> Any:
    """An entry along an axis that its rank picks, and where it is."""
    if arguments and isinstance(arguments[0], Label):
        return add(t, x, arguments[0])
    if len(t.shapes) == 1:
        return reduce_other(t, x)
    (axis,) = _axes(x, arguments[t.name == "kthvalue"])
    values = _without(t, _ranked(t, x, axis), [axis], len(t.shape) == len(x.shape))
    return _and_positions(t, values)


@rule("argmax", "argmin")
def arg(t: Trace, x: Label, axis: Any = None, *_: Any) -> Label:
    """Positions along an axis: it may not move."""
    over = _axes(x, axis)
    reduced = _without(t, op.inhomogeneous(t, t.pin(x, over), over), over, len(t.shape) == len(x.shape))
    return _scaled(t, reduced, "forget", None)


@rule("sort", "topk")
def sort(t: Trace, x: Label, *arguments: Any) -> tuple[Label, Label]:
    """Sorted values have lost the index of their axis; the positions, once used, pin it."""
    whole = [value for value in arguments if isinstance(value, int) and not isinstance(value, bool)]
    (axis,) = _axes(x, whole[t.name == "topk"])
    return _and_positions(t, _filled(t, _without(t, _ranked(t, x, axis), [axis], keep=True)))


def _filled(t: Trace, label: Label) -> Label:
    """Grow axes of size 1 to the operator's output, as fixed ones."""
    return t.freeze(label, {axis: size for axis, size in enumerate(t.shape) if size != label.shape[axis]})


@rule("softmax", "log_softmax")
def softmax(t: Trace, x: Label, axis: int, *_: Any) -> Label:
    """Symmetric along its axis; one head for each index of the axes before the last two."""
    (axis,) = _axes(x, axis)
    t.note_heads(x, axis)
    return op.symmetric(t, op.inhomogeneous(t, x), [axis])


@rule("linalg_vector_norm", "norm")
def vector_norm(t: Trace, x: Label, order: Any = 2, axes: Any = None, keep: bool = False, *_: Any) -> Label:
    """A norm over axes: positive factors of the others stay, signs are lost; of order 0, factors too."""
    over = _axes(x, axes)
    if t.powers == "positive" and order != 0:
        return _without(t, op.inhomogeneous(t, x, over), over, keep)
    return _without(t, t.with_powers(x, lambda form: ()), over, keep)


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(t: Trace, x: Label, axes: Sequence[int], *_: Any) -> Label:
    """Linear; the axes that it transforms are fixed."""
    return t.freeze(x, {axis: t.shape[axis] for axis in _axes(x, axes)})._replace(shift=None)


@rule("cumsum", "cumprod", "logcumsumexp", "flip", "roll", "cummax", "cummin")
def ordered(t: Trace, x: Label, axes: Any, more: Any = None, *_: Any) -> Any:
    """The order along some axes matters: they are fixed."""
    which = _axes(x, more if t.name == "roll" else axes)
    kept = t.freeze(x, {axis: x.shape[axis] for axis in which})
    if t.name in ("cumprod", "logcumsumexp") or (t.name in ("cummax", "cummin") and t.powers == "sign"):
        kept = op.inhomogeneous(t, kept)
    return _and_positions(t, kept) if len(t.shapes) == 2 else kept


# -- products ----------------------------------------------------------------------------------------------


@rule("linear")
def linear(t: Trace, x: Label, weight: Label, bias: Label | None = None) -> Label:
    """``x W^T + b``."""
    letters = _letters(len(x.shape) - 1)
    product = op.einsum(t, f"{letters}y,zy->{letters}z", x, weight)
    return product if bias is None else add_in(t, product, bias)


def add_in(t: Trace, product: Label, bias: Label) -> Label:
    """Add a bias, and remember it for the phase symmetry of a sine."""
    return op.pointwise(t, [product, bias], "add")._replace(shift=bias.shift)


def _letters(count: int, first: str = "a") -> str:
    return "".join(chr(ord(first) + at) for at in range(count))


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(t: Trace, x: Label, y: Label) -> Label:
    """Matrix products; leading axes are batches and broadcast."""
    ranks = len(x.shape), len(y.shape)
    batch = _letters(max(max(ranks) - 2, 0))
    left = batch[len(batch) - max(ranks[0] - 2, 0) :] + ("xy" if ranks[0] > 1 else "y")
    right = batch[len(batch) - max(ranks[1] - 2, 0) :] + ("yz" if ranks[1] > 1 else "y")
    out = batch + ("x" if ranks[0] > 1 else "") + ("z" if ranks[1] > 1 else "")
    return op.einsum(t, f"{left},{right}->{out}", x, y)


@rule("addmm", "addmv", "baddbmm")
def addmm(t: Trace, bias: Label, x: Label, y: Label, beta: Any = 1, *_: Any) -> Label:
    """A product plus a bias."""
    return add_in(t, matmul(t, x, y), bias if beta == 1 else bias._replace(shift=None))


@rule("_cdist_forward")
def distances(t: Trace, x: Label, y: Label, *_: Any) -> Label:
    """Norms of the differences of rows: (..., rows, features) against (..., rows, features)."""
    rank = len(x.shape)
    end = None if t.powers == "positive" else rank - 1
    x, y = (op.inhomogeneous(t, part, None if end is None else range(end)) for part in (x, y))
    batch = _letters(rank - 2)
    # the powers of features must agree, which modulo 2 is to say that they add to 0
    return op.einsum(t, f"{batch}xz,{batch}yz->{batch}xy", x, y)


@rule("outer", "ger")
def outer(t: Trace, x: Label, y: Label) -> Label:
    """All products of two vectors' entries."""
    return op.einsum(t, "a,b->ab", x, y)


@rule("einsum")
def einsum(t: Trace, equation: str, operands: Sequence[Label], *_: Any) -> Label:
    """Any product of values; more than two operands are multiplied from left to right."""
    equation = equation.replace(" ", "")
    inputs, out = equation.split("->") if "->" in equation else (equation, None)
    names = inputs.split(",")
    if "." in equation:
        names, out = _dots(names, out, [len(label.shape) for label in operands])
    if out is None:
        seen = "".join(names)
        out = "".join(sorted(name for name in set(seen) if seen.count(name) == 1))
    if any(len(set(part)) < len(part) for part in names):
        t.give_up(operands)
        return t.fixed(t.shape)
    result, letters = operands[0], names[0]
    for place in range(1, len(operands)):
        later = out + "".join(names[place + 1 :])
        merged = "".join(dict.fromkeys(letters + names[place]))
        kept = "".join(name for name in merged if name in later) if place + 1 < len(operands) else out
        result = op.einsum(t, f"{letters},{names[place]}->{kept}", result, operands[place])
        letters = kept
    if len(operands) == 1:
        gone = [axis for axis, name in enumerate(letters) if name not in out]
        result = op.total(t, result, gone)
        letters = "".join(name for name in letters if name in out)
        result = op.permute(t, result, [letters.index(name) for name in out])
    return result


def _dots(names: Sequence[str], out: str | None, ranks: Sequence[int]) -> tuple[list[str], str]:
    extra = max(rank - len(name) + 3 for name, rank in zip(names, ranks, strict=True) if "." in name)
    dots = _letters(extra, "\u0400")
    written = [
        name.replace("...", dots[extra - (rank - len(name) + 3) :])
        for name, rank in zip(names, ranks, strict=True)
    ]
    seen = "".join(names).replace(".", "")
    rest = "".join(sorted(name for name in set(seen) if seen.count(name) == 1))
    return written, dots + rest if out is None else out.replace("...", dots)


@rule("bilinear")
def bilinear(t: Trace, x: Label, y: Label, weight: Label, bias: Any = None, *_: Any) -> Label:
    """``x_i W_{oij} y_j + b``; both operands have the same leading axes."""
    letters = _letters(len(x.shape) - 1)
    half = op.einsum(t, f"{letters}x,zxy->{letters}zy", x, weight)
    whole = op.einsum(t, f"{letters}zy,{letters}y->{letters}z", half, y)
    return add_in(t, whole, bias) if isinstance(bias, Label) else whole


@rule("embedding")
def embedding(t: Trace, weight: Label, positions: Label, *_: Any) -> Label:
    """Rows looked up by position: the vocabulary is fixed."""
    weight = t.pin(weight, [0], t.reason.replace("embedding", "vocabulary of embedding"))
    return index(t, weight, [positions])


@rule("embedding_renorm")
def shorten(t: Trace, weight: Label, positions: Label, *_: Any) -> Label:
    """Rows are scaled down to a largest norm."""
    t.give_up([positions])
    weight = t.pin(weight, [0])
    return op.inhomogeneous(t, weight) if t.powers == "positive" else weight


@rule("embedding_bag")
def embedding_bag(
    t: Trace, weight: Label, positions: Label, offsets: Label, *settings: Any
) -> tuple[Label, ...]:
    """Sums, means or maxima of rows."""
    mode, factors = settings[1], settings[3]
    looked_up = embedding(t, weight, t.pin(positions))
    bags = t.freeze(looked_up, {0: t.shape[0]})
    if mode == 2:
        bags = _scaled(t, bags, "keep", None)
    t.give_up(part for part in (offsets, factors) if isinstance(part, Label))
    return (bags, *(t.fixed(shape) for shape in t.shapes[1:]))


# -- convolutions and pooling ------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d")
def convolution(t: Trace, x: Label, weight: Label, bias: Any, *settings: Any) -> Label:
    """Channels are contracted within each group of channels; space is fixed."""
    return _convolve(t, x, weight, bias, int(settings[-1]), transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(t: Trace, x: Label, weight: Label, bias: Any, *settings: Any) -> Label:
    """As a convolution, with the weight's first two axes exchanged."""
    return _convolve(t, x, weight, bias, int(settings[3]), transposed=True)


@rule("convolution")
def any_convolution(t: Trace, x: Label, weight: Label, bias: Any, *settings: Any) -> Label:
    """The general form."""
    return _convolve(t, x, weight, bias, int(settings[5]), transposed=bool(settings[3]))


def _convolve(t: Trace, x: Label, weight: Label, bias: Any, groups: int, *, transposed: bool) -> Label:
    space = len(weight.shape) - 2
    single = len(x.shape) == space + 1
    if single:
        x = op.unsqueeze(t, x, 0)
    out_shape = (1, *t.shape) if single else t.shape
    x = _without(t, t.pin(x, range(2, 2 + space), "spatial axis"), range(2, 2 + space), False)
    weight = _without(t, t.pin(weight, range(2, 2 + space), "kernel axis"), range(2, 2 + space), False)
    (batch, channels), inner = x.shape, weight.shape
    x = t.reshape(x, [batch, groups, channels // groups])
    weight = t.reshape(weight, [groups, inner[0] // groups, inner[1]])
    equation = "bgi,gio->bgo" if transposed else "bgi,goi->bgo"
    out = t.reshape(op.einsum(t, equation, x, weight), out_shape[:2])
    out = add_in(t, out, bias) if isinstance(bias, Label) else out
    shift = out.shift
    out = t.reaxis(out, [0, 1, *[None] * space], [*out.shape, *[1] * space])
    out = t.freeze(out, dict(enumerate(out_shape[2:], 2)))._replace(shift=shift)
    return op.select(t, out, 0, 0) if single else out


@rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
      "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")  # fmt: skip
def max_pool(t: Trace, x: Label, *_: Any) -> Any:
    """Pools space, which is fixed; positive factors pass."""
    pooled = _resized(t, _scaled(t, x, "keep", None))
    return _and_positions(t, pooled) if len(t.shapes) == 2 else pooled


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
      "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
      "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def resample(t: Trace, x: Label, *_: Any) -> Label:
    """Linear in values, over space, which is fixed."""
    return _resized(t, x)._replace(shift=None)


def _resized(t: Trace, x: Label) -> Label:
    """Fix the last axes, as many as the operator's name says (``"avg_pool2d"``), and give them the new sizes."""
    space = int(next(letter for letter in t.name if letter.isdigit()))
    return t.freeze(x, dict(list(enumerate(t.shape))[-space:]))


@rule("pad")
def pad(t: Trace, x: Label, amounts: Sequence[int], mode: str = "constant", value: Any = None) -> Label:
    """A constant goes beside what is there; other modes fix the axes that grow. A value not 0 ends all scaling."""
    ends = [(len(x.shape) - 1 - at // 2, *amounts[at : at + 2]) for at in range(0, len(amounts), 2)]
    if value:
        x = op.inhomogeneous(t, x)
    for axis, before, after in ends:
        if mode == "constant":
            x = _between(t, x, axis, before, after, zero=not value)
        elif before or after:
            x = t.freeze(x, {axis: t.shape[axis]})
    return x._replace(shift=None)


@rule("constant_pad_nd")
def constant_pad(t: Trace, x: Label, amounts: Sequence[int], value: Any = 0) -> Label:
    """As :func:`pad`, with a constant."""
    return pad(t, x, amounts, "constant", value)


def _between(t: Trace, x: Label, axis: int, before: int, after: int, *, zero: bool) -> Label:
    """Grow an axis (or shrink, by less than 0) at both ends."""
    first, size = max(-before, 0), x.shape[axis]
    x = op.narrow(t, x, axis, first, size - first - max(-after, 0))
    if t.is_plain(x, [axis]):
        return t.freeze(x, {axis: t.shape[axis]})
    start, end = (
        t.fresh([count if at == axis else n for at, n in enumerate(x.shape)])._replace(zero=zero)
        for count in (max(before, 0), max(after, 0))
    )
    return concatenate(t, [start, x, end], axis)


@rule("grid_sampler_2d", "grid_sampler_3d")
def sample(t: Trace, x: Label, places: Label, *_: Any) -> Label:
    """Linear in values, read at places that depend on nothing that moves."""
    t.give_up([places])
    return t.freeze(x, {axis: t.shape[axis] for axis in range(len(t.shape)) if axis != 1})._replace(
        shift=None
    )


@rule("im2col")
def patches(t: Trace, x: Label, *_: Any) -> Label:
    """(N, C, H, W) to (N, C k, L): the places within a patch are an inner index of the channels."""
    row, column = len(x.shape) - 2, len(x.shape) - 1
    within = t.shape[-2] // x.shape[-3]
    return t.reshape(t.freeze(x, {row: within, column: t.shape[-1]}), t.shape)


@rule("col2im")
def from_patches(t: Trace, x: Label, *_: Any) -> Label:
    """(N, C k, L) to (N, C, H, W): sums of patches that overlap."""
    *batch, channels, _height, _width = t.shape
    split = t.reshape(x, [*batch, channels, x.shape[-2] // channels, x.shape[-1]])
    return t.freeze(split, {axis: t.shape[axis] for axis in range(len(t.shape) - 2, len(t.shape))})


@rule("pixel_shuffle")
def pixel_shuffle(t: Trace, x: Label, factor: int) -> Label:
    """(C r r, H, W) to (C, H r, W r)."""
    *batch, channels, height, width = x.shape
    n = len(batch)
    split = t.reshape(x, [*batch, channels // factor**2, factor, factor, height, width])
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    return t.reshape(op.permute(t, split, order), t.shape)


@rule("pixel_unshuffle")
def pixel_unshuffle(t: Trace, x: Label, factor: int) -> Label:
    """(C, H r, W r) to (C r r, H, W)."""
    *batch, channels, height, width = x.shape
    n = len(batch)
    split = t.reshape(x, [*batch, channels, height // factor, factor, width // factor, factor])
    return t.reshape(op.permute(t, split, [*range(n), n, n + 2, n + 4, n + 1, n + 3]), t.shape)


@rule("channel_shuffle")
def channel_shuffle(t: Trace, x: Label, groups: int) -> Label:
    """Interleave groups of channels."""
    batch, channels, *space = x.shape
    split = t.reshape(x, [batch, groups, channels // groups, *space])
    return t.reshape(op.transpose(t, split, 1, 2), t.shape)


# -- norms -------------------------------------------------------------------------------------------------


def _affine(t: Trace, x: Label, parts: Sequence[Any], combine: Sequence[op.Combine]) -> Label:
    for part, how in zip(parts, combine, strict=True):
        if isinstance(part, Label):
            x = op.pointwise(t, [x, part], how)
    return x._replace(shift=None)


def _per_channel(t: Trace, part: Any, rank: int) -> Any:
    if not isinstance(part, Label):
        return part
    return t.reaxis(part, [None, 0, *[None] * (rank - 2)], [1, *part.shape, *[1] * (rank - 2)])


@rule("_native_batch_norm_legit_no_training")
def batch_norm(t: Trace, x: Label, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any) -> Any:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` per channel; eps ends positive scaling."""
    rank = len(x.shape)
    mean, variance, weight, bias = (_per_channel(t, part, rank) for part in (mean, variance, weight, bias))
    centred = op.pointwise(t, [x, mean], "add") if isinstance(mean, Label) else x
    if t.powers == "positive":
        centred = op.inhomogeneous(t, centred)
    if isinstance(variance, Label):
        centred = op.pointwise(t, [centred, op.inhomogeneous(t, variance)], "multiply")
    out = _affine(t, centred, (weight, bias), ("multiply", "add"))
    # the statistics of the batch, which nobody reads here
    rest = tuple(
        t.reaxis(out, [1], [count]) if (count := shape[0]) else t.fixed(shape) for shape in t.shapes[1:]
    )
    return (out, *rest) if rest else out


@rule("_native_batch_norm_legit", "_native_batch_norm_legit_functional")
def own_statistics(
    t: Trace, x: Label, weight: Any, bias: Any, mean: Any = None, variance: Any = None, *_: Any
) -> Any:
    """A batch norm with the mean and variance of each channel of the batch at hand."""
    over = [axis for axis in range(len(x.shape)) if axis != 1]
    return batch_norm(t, _normalised(t, x, over), weight, bias, mean, variance)


def _normalised(t: Trace, x: Label, over: Sequence[int]) -> Label:
    """Centred and scaled over some axes: no scaling along them, and no positive one at all, survives."""
    x = op.inhomogeneous(t, x, None if t.powers == "positive" else over)
    return op.symmetric(t, x, over)


@rule("instance_norm")
def instance_norm(
    t: Trace, x: Label, weight: Any, bias: Any, mean: Any, variance: Any, own_statistics: bool, *_: Any
) -> Label:
    """Each channel of each item by itself over space; eps ends positive scaling."""
    if not own_statistics:
        return batch_norm(t, x, weight, bias, mean, variance)
    rank = len(x.shape)
    x = _normalised(t, x, range(2, rank))
    return _affine(t, x, [_per_channel(t, part, rank) for part in (weight, bias)], ("multiply", "add"))


@rule("layer_norm")
def layer_norm(
    t: Trace, x: Label, over: Sequence[int], weight: Any = None, bias: Any = None, *_: Any
) -> Label:
    """Over the last axes: subtracting their mean ends scaling along them."""
    x = _normalised(t, x, range(len(x.shape) - len(over), len(x.shape)))
    return _affine(t, x, (weight, bias), ("multiply", "add"))


@rule("rms_norm")
def rms_norm(t: Trace, x: Label, over: Sequence[int], weight: Any = None, *_: Any) -> Label:
    """Over the last axes; a sign is lost in the square and stays in the value."""
    axes = range(len(x.shape) - len(over), len(x.shape))
    x = op.symmetric(t, op.inhomogeneous(t, x) if t.powers == "positive" else x, axes)
    return _affine(t, x, (weight,), ("multiply",))


@rule("group_norm")
def group_norm(t: Trace, x: Label, groups: int, weight: Any = None, bias: Any = None, *_: Any) -> Label:
    """Channels within each group of channels, and space: a permutation must respect the groups."""
    batch, channels, *space = x.shape
    split = t.reshape(x, [batch, groups, channels // groups, *space])
    out = t.reshape(_normalised(t, split, range(2, len(split.shape))), x.shape)
    parts = [_per_channel(t, part, len(x.shape)) for part in (weight, bias)]
    return _affine(t, out, parts, ("multiply", "add"))


@rule("_weight_norm")
def weight_norm(t: Trace, direction: Label, size: Label, axis: int = 0) -> Label:
    """``size * direction / |direction|``, with a norm for each index of ``axis``, or one of all for -1."""
    over = [at for at in range(len(direction.shape)) if at != axis]
    length = vector_norm(t, direction, 2, over, keep=True)
    direction = t.resolve(direction)
    inverse = t.with_powers(length, lambda form: times(form, t.fraction(-1)))
    unit = op.pointwise(t, [direction, inverse], "multiply")
    return op.pointwise(t, [unit, size], "multiply")


# -- shapes ------------------------------------------------------------------------------------------------


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


@rule("index", "_unsafe_index")
def index(t: Trace, x: Label, places: Sequence[Any]) -> Label:
    """Look up entries by position: the indexed axes are fixed, and the positions' own axes take their place."""
    indexed = [axis for axis, place in enumerate(places) if isinstance(place, Label)]
    rest: list[int | None] = list(range(len(x.shape) - len(indexed)))
    positions = op.pointwise(t, [op.inhomogeneous(t, places[axis]) for axis in indexed], "add")
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    first, new = indexed[0] if together else 0, len(positions.shape)
    kept = _without(t, t.pin(x, indexed), indexed, False)
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
    x, values, positions = (_without(t, t.pin(part, [axis]), [axis], keep=True) for part in parts)
    total = op.pointwise(t, [x, values], "add")
    return _filled(t, op.pointwise(t, [total, op.inhomogeneous(t, positions)], "multiply"))


@rule("scatter_reduce")
def scatter_reduce(
    t: Trace, x: Label, axis: int, positions: Label, values: Label, reduce: str, include_self: bool = True
) -> Label:
    """Sums, means, extremes or products of entries by position along one axis."""
    if reduce in ("amax", "amin"):
        x, values = (_scaled(t, part, "keep", None) for part in (x, values))
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
            t, [t.pin(x, [axis]), _without(t, t.pin(values, [axis]), [axis], keep=True)], "add"
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


# what repeats a fixed value has indices of its own, which are free
UNIFORM.update((expand, repeat, repeat_interleave))


@rule("unfold")
def windows(t: Trace, x: Label, axis: int, *_: Any) -> Label:
    """Runs of an axis, which is fixed, along a new last one."""
    return _filled(t, op.unsqueeze(t, t.freeze(x, {axis % len(x.shape): t.shape[axis]}), len(x.shape)))


@rule("tril", "triu")
def triangular(t: Trace, x: Label, *_: Any) -> Label:
    """Positions along the last two axes matter: they are fixed."""
    return t.freeze(x, {axis: x.shape[axis] for axis in (len(x.shape) - 2, len(x.shape) - 1)})


@rule("diagonal", "diagonal_copy")
def diagonal(t: Trace, x: Label, offset: int = 0, first: int = 0, second: int = 1) -> Label:
    """Two axes are fixed and become a last one."""
    axes = [axis % len(x.shape) for axis in (first, second)]
    kept = _without(t, t.pin(x, axes), axes, keep=False)
    return _filled(t, op.unsqueeze(t, kept, len(kept.shape)))


@rule("diag_embed")
def diag_embed(t: Trace, x: Label, offset: int = 0, first: int = -2, second: int = -1) -> Label:
    """The last axis is fixed and becomes two."""
    last, rank = len(x.shape) - 1, len(t.shape)
    axes = sorted(axis % rank for axis in (first, second))
    kept = _without(t, t.pin(x, [last]), [last], keep=False)
    for axis in axes:
        kept = op.unsqueeze(t, kept, axis)
    return _filled(t, kept)


# -- attention and recurrence ------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def attention(
    t: Trace,
    query: Label,
    key: Label,
    value: Label,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    grouped: bool = False,
) -> Label:
    """``softmax(q k^T) v``; with grouped queries each key's head serves several."""
    if grouped and query.shape[-3] != key.shape[-3]:
        heads, served = key.shape[-3], query.shape[-3] // key.shape[-3]
        query = t.reshape(query, [*query.shape[:-3], heads, served, *query.shape[-2:]])
        key, value = (op.unsqueeze(t, part, len(part.shape) - 2) for part in (key, value))
        mask = _of_queries(t, mask, heads, served)
    if is_causal:
        query, key = (t.pin(part, [len(part.shape) - 2]) for part in (query, key))
    batch = _letters(len(query.shape) - 2)
    scores = op.einsum(t, f"{batch}xe,{batch}ye->{batch}xy", query, key)
    if isinstance(mask, Label):
        scores = op.pointwise(t, [op.inhomogeneous(t, scores), op.inhomogeneous(t, mask)], "add")
    attended = softmax(t, scores, -1)
    out = op.einsum(t, f"{batch}xy,{batch}ye->{batch}xe", attended, value)
    return t.reshape(out, t.shape)


def _of_queries(t: Trace, mask: Any, heads: int, served: int) -> Any:
    """A mask for (key heads, queries that each serves) in place of query heads."""
    if not isinstance(mask, Label) or len(mask.shape) < 3:
        return mask
    split = (heads, served) if mask.shape[-3] > 1 else (1, 1)
    return t.reshape(mask, [*mask.shape[:-3], *split, *mask.shape[-2:]])


@rule("gru", "lstm", "rnn_tanh", "rnn_relu")
def recurrent(t: Trace, x: Label, *arguments: Any) -> tuple[Label, ...]:
    """Each layer and direction steps to a fixed point: the state that leaves is the state that entered."""
    if isinstance(arguments[1], Label):  # a packed sequence: sizes of the batch come before the states
        t.give_up(_flat([x, *arguments]))
        return tuple(t.fixed(shape) for shape in t.shapes)
    states, weights, has_biases, layers, _, _, bidirectional, batch_first = arguments
    states = list(states) if isinstance(states, list | tuple) and not isinstance(states, Label) else [states]
    if not batch_first:
        x = op.transpose(t, x, 0, 1)
    directions = 2 if bidirectional else 1
    per_cell = len(weights) // (layers * directions)
    last: list[list[Label]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            cell = weights[place * per_cell : (place + 1) * per_cell]
            before = [op.select(t, state, 0, place) for state in states]
            after = _cell(t, x, before, cell, has_biases)
            outputs.append(after[0])
            for kept, state in zip(last, after, strict=True):
                kept.append(op.select(t, state, 1, 0))
        x = op.concatenate(t, outputs, 2) if directions == 2 else outputs[0]
        t.see(x)
    out = x if batch_first else op.transpose(t, x, 0, 1)
    final = [op.concatenate(t, [op.unsqueeze(t, part, 0) for part in kept], 0) for kept in last]
    return (out, *final)


def _flat(value: Any) -> list[Label]:
    if isinstance(value, Label):
        return [value]
    return [label for part in value for label in _flat(part)] if isinstance(value, list | tuple) else []


def _cell(
    t: Trace, x: Label, states: Sequence[Label], weights: Sequence[Label], has_biases: bool
) -> list[Label]:
    """New states (batch, time, hidden) of one layer: what it reads is what it writes."""
    into, back, *rest = weights
    biases = rest[:2] if has_biases else [None, None]
    projection = rest[-1] if len(rest) in (1, 3) else None
    hidden = [t.loose(op.unsqueeze(t, state, 1)) for state in states]  # one unknown for all its uses
    driven = linear(t, x, into, biases[0])
    length = driven.shape[1]
    fed = linear(t, hidden[0], back, biases[1])
    step = {"gru": _gru_step, "lstm": _lstm_step}.get(t.name, _plain_step)
    fed, driven = t.resolve(fed), t.resolve(driven)
    after = step(t, driven, fed, hidden)
    if projection is not None:
        after[0] = linear(t, after[0], projection)
    closed = []
    for new, old in zip(after, hidden, strict=True):
        grown = op.spread(t, old, (*old.shape[:1], length, *old.shape[2:]))
        closed.append(op.pointwise(t, [new, grown], "add"))
    return closed


def _plain_step(t: Trace, driven: Label, fed: Label, hidden: Sequence[Label]) -> list[Label]:
    total = op.pointwise(t, [driven, fed], "add")
    name = t.name.removeprefix("rnn_")
    _activation(t, total, name)
    return [_scaled(t, total, *_UNARY[name])]


def _gates(t: Trace, x: Label, count: int) -> list[Label]:
    size = x.shape[-1] // count
    return [op.narrow(t, x, len(x.shape) - 1, at * size, size) for at in range(count)]


def _gru_step(t: Trace, driven: Label, fed: Label, hidden: Sequence[Label]) -> list[Label]:
    """Reset, update, new; the reset gate multiplies what the state feeds to the new one."""
    (r_in, z_in, n_in), (r_back, z_back, n_back) = _gates(t, driven, 3), _gates(t, fed, 3)
    reset = op.inhomogeneous(t, op.pointwise(t, [r_in, r_back], "add"))
    update = op.inhomogeneous(t, op.pointwise(t, [z_in, z_back], "add"))
    candidate = op.pointwise(t, [n_in, op.pointwise(t, [reset, n_back], "multiply")], "add")
    _activation(t, candidate, "tanh")
    new = _scaled(t, candidate, *_UNARY["tanh"])
    kept = op.pointwise(t, [update, hidden[0]], "multiply")
    return [op.pointwise(t, [op.pointwise(t, [update, new], "multiply"), kept], "add")]


def _lstm_step(t: Trace, driven: Label, fed: Label, hidden: Sequence[Label]) -> list[Label]:
    """Input, forget, cell, output."""
    gates = [
        op.pointwise(t, pair, "add") for pair in zip(_gates(t, driven, 4), _gates(t, fed, 4), strict=True)
    ]
    enter, forget, leave = (op.inhomogeneous(t, gates[at]) for at in (0, 1, 3))
    _activation(t, gates[2], "tanh")
    candidate = _scaled(t, gates[2], *_UNARY["tanh"])
    kept = op.pointwise(t, [forget, hidden[1]], "multiply")
    cell = op.pointwise(t, [kept, op.pointwise(t, [enter, candidate], "multiply")], "add")
    shown = _scaled(t, cell, *_UNARY["tanh"])
    return [op.pointwise(t, [leave, shown], "multiply"), cell]
