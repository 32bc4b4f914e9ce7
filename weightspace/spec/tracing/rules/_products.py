"""Matrix products, einsum, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._trace import Trace, rule
from weightspace.spec.tracing.rules._indexing import index
from weightspace.spec.tracing.rules._unary import scaled


@rule("linear")
def linear(t: Trace, x: Label, weight: Label, bias: Label | None = None) -> Label:
    """``x W^T + b``."""
    letters = axis_letters(len(x.shape) - 1)
    product = op.einsum(t, f"{letters}y,zy->{letters}z", x, weight)
    return product if bias is None else add_in(t, product, bias)


def add_in(t: Trace, product: Label, bias: Label) -> Label:
    """Add a bias, and remember it for the phase symmetry of a sine."""
    return op.pointwise(t, [product, bias], "add")._replace(shift=bias.shift)


def axis_letters(count: int, first: str = "a") -> str:
    return "".join(chr(ord(first) + at) for at in range(count))


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(t: Trace, x: Label, y: Label) -> Label:
    """Matrix products; leading axes are batches and broadcast."""
    ranks = len(x.shape), len(y.shape)
    batch = axis_letters(max(max(ranks) - 2, 0))
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
    batch = axis_letters(rank - 2)
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
    dots = axis_letters(extra, "\u0400")
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
    letters = axis_letters(len(x.shape) - 1)
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
        bags = scaled(t, bags, "keep", None)
    t.give_up(part for part in (offsets, factors) if isinstance(part, Label))
    return (bags, *(t.fixed(shape) for shape in t.shapes[1:]))
