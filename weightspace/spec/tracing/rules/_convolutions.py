"""Convolutions, pooling, padding, and what moves channels into space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._labels import Label
from weightspace.spec.tracing._trace import Trace, rule
from weightspace.spec.tracing.rules._axes import and_positions, without
from weightspace.spec.tracing.rules._products import add_in
from weightspace.spec.tracing.rules._shapes import concatenate
from weightspace.spec.tracing.rules._unary import scaled


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
    x = without(t, t.pin(x, range(2, 2 + space), "spatial axis"), range(2, 2 + space), False)
    weight = without(t, t.pin(weight, range(2, 2 + space), "kernel axis"), range(2, 2 + space), False)
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
    pooled = _resized(t, scaled(t, x, "keep", None))
    return and_positions(t, pooled) if len(t.shapes) == 2 else pooled


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
