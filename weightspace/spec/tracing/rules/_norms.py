"""Normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._powers import times
from weightspace.spec.tracing._trace import Trace, rule
from weightspace.spec.tracing.rules._reductions import vector_norm


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
