"""Functions of one variable, entry by entry: what they do to powers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from weightspace.errors import SpecError
from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._powers import times
from weightspace.spec.tracing._program import operator_name
from weightspace.spec.tracing._trace import Trace, rule

# what a function of one variable does to powers: (positive factors, signs); None where no scaling survives
UNARY: dict[str, tuple[str | None, str | None]] = {
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
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "glu", "rrelu", "sine", "gaussian", "cosine", "log_sigmoid",
    "softmax", "log_softmax",
}  # fmt: skip


def note_activation(t: Trace, x: Label, name: str, axes: Collection[int] | None = None) -> None:
    """Note what the units apply, those of some axes or all, if nothing is noted yet."""

    def note(atom: Any) -> None:
        atom.activation = atom.activation or name

    if name in _ACTIVATIONS:
        t.atoms.mark((n for n in t.numbers(t.resolve(x), axes) if t.atoms.is_live(n)), note)


def scaled(t: Trace, x: Label, positive: str | None, sign: str | None) -> Label:
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
        note_activation(t, x, _function(t.node, name))
        return scaled(t, x, positive, sign)


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


for _name, (_positive, _sign) in UNARY.items():
    if _name != "sin":
        unary_rule(_name, _positive, _sign)
