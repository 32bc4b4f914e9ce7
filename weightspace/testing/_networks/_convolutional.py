"""Cases made of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.testing._networks._case import case, floats

Image: TypeAlias = Float[Tensor, "batch channels height width"]
Features: TypeAlias = Float[Tensor, "batch features rows columns"]
Scores: TypeAlias = Float[Tensor, "batch out_features"]


def _pooled(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


@case(floats((2, 3, 28, 28)), floats((4, 3, 28, 28)))
def lenet() -> nn.Module:
    """Convolutions flattened into linear layers: a channel's pixels move together."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 5),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 14),
        nn.Sigmoid(),
        nn.Linear(14, 12),
        nn.Sigmoid(),
        nn.Linear(12, 10),
    )


@case(floats((3, 3, 8, 8)), floats((5, 3, 8, 8)))
def vgg_flatten() -> nn.Module:
    """Convolutions with 2 x 2 pixels left, flattened into linear layers with dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 7, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(7, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 12),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(12, 11),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(11, 4),
    )


class _Shortcut(nn.Module):
    """``relu(branch(x) + shortcut(x))``: a residual block as ResNets have it."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Image) -> Features:
        return torch.relu(self.branch(x) + self.shortcut(x))


def _normalised(fan_in: int, fan_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(fan_in, fan_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(fan_out))


def _downsample(fan_in: int, fan_out: int, stride: int) -> nn.Module:
    return nn.Identity() if (fan_in, stride) == (fan_out, 1) else _normalised(fan_in, fan_out, 1, stride)


def _basic(fan_in: int, hidden: int, fan_out: int, stride: int) -> nn.Module:
    first, second = _normalised(fan_in, hidden, 3, stride), _normalised(hidden, fan_out, 3)
    return _Shortcut(nn.Sequential(first, nn.ReLU(), second), _downsample(fan_in, fan_out, stride))


def _bottleneck(fan_in: int, hidden: int, fan_out: int, stride: int, groups: int = 1) -> nn.Module:
    branch = nn.Sequential(
        _normalised(fan_in, hidden, 1),
        nn.ReLU(),
        _normalised(hidden, hidden, 3, stride, groups),
        nn.ReLU(),
        _normalised(hidden, fan_out, 1),
    )
    return _Shortcut(branch, _downsample(fan_in, fan_out, stride))


def _stem(width: int) -> list[nn.Module]:
    return [_normalised(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]


@case(floats((2, 3, 32, 32)), floats((4, 3, 40, 48)))
def resnet18() -> nn.Module:
    """Basic blocks with batch norm, two a stage, shortcuts projected where the width changes."""
    stages = [
        nn.Sequential(_basic(fan_in, first, fan_out, stride), _basic(fan_out, second, fan_out, 1))
        for fan_in, first, second, fan_out, stride in [
            (5, 6, 8, 5, 1),
            (5, 10, 12, 7, 2),
            (7, 13, 14, 9, 2),
            (9, 15, 16, 11, 2),
        ]
    ]
    return nn.Sequential(*_stem(5), *stages, *_pooled(11, 4))


def _resnet50(
    stem: int, hidden: Sequence[int], widths: Sequence[int], blocks: Sequence[int], classes: int
) -> nn.Module:
    stages = []
    for stage, (fan_in, fan_out) in enumerate(pairwise((stem, *widths))):
        first = _bottleneck(fan_in, hidden[stage], fan_out, 2 if stage else 1)
        rest = (_bottleneck(fan_out, hidden[stage], fan_out, 1) for _ in range(1, blocks[stage]))
        stages.append(nn.Sequential(first, *rest))
    return nn.Sequential(*_stem(stem), *stages, *_pooled(widths[-1], classes))


@case(floats((2, 3, 32, 32)), floats((4, 3, 40, 48)))
def resnet50_tiny() -> nn.Module:
    """Bottleneck blocks with batch norm, in the shape of ResNet-50 but narrow."""
    return _resnet50(5, (6, 7, 8, 9), (11, 13, 15, 17), (3, 2, 2, 2), classes=4)


@case(floats((2, 3, 64, 64)), floats((3, 3, 96, 96)), family="large")
def resnet50() -> nn.Module:
    """ResNet-50 at full width: 25.6 million parameters."""
    return _resnet50(64, (64, 128, 256, 512), (256, 512, 1024, 2048), (3, 4, 6, 3), classes=1000)


@case(floats((2, 3, 16, 16)), floats((4, 3, 24, 16)))
def resnext() -> nn.Module:
    """Bottleneck blocks with grouped convolutions: groups permute, and channels within each."""
    first = _bottleneck(5, 12, 7, 1, groups=3)
    second = _bottleneck(7, 20, 9, 2, groups=4)
    third = _bottleneck(9, 18, 9, 1, groups=3)
    return nn.Sequential(*_stem(5), first, second, third, *_pooled(9, 4))


class _DenseLayer(nn.Module):
    """Appends new channels to the old ones."""

    def __init__(self, fan_in: int, hidden: int, growth: int) -> None:
        super().__init__()
        self.norm, self.hidden_norm = nn.BatchNorm2d(fan_in), nn.BatchNorm2d(hidden)
        self.squeeze = nn.Conv2d(fan_in, hidden, 1, bias=False)
        self.grow = nn.Conv2d(hidden, growth, 3, padding=1, bias=False)

    def forward(self, x: Image) -> Features:
        hidden = torch.relu(self.hidden_norm(self.squeeze(torch.relu(self.norm(x)))))
        return torch.cat([x, self.grow(hidden)], 1)


@case(floats((2, 3, 16, 16)), floats((4, 3, 24, 16)))
def densenet() -> nn.Module:
    """Every layer reads all before it: one weight, many cells along its input axis."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=False),
        _DenseLayer(7, 8, 4),
        _DenseLayer(11, 9, 5),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 10, 1, bias=False),
        nn.AvgPool2d(2),
        _DenseLayer(10, 12, 3),
        _DenseLayer(13, 14, 6),
        nn.BatchNorm2d(19),
        nn.ReLU(),
        *_pooled(19, 4),
    )


class _SqueezeExcitation(nn.Module):
    """Hu et al. 2017, "Squeeze-and-Excitation Networks", arXiv:1709.01507."""

    def __init__(self, width: int, hidden: int, gate: nn.Module) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.gate = gate

    def forward(self, x: Image) -> Image:
        hidden = torch.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        out: Tensor = x * self.gate(self.excite(hidden))
        return out


@case(floats((2, 3, 12, 12)), floats((4, 3, 16, 12)))
def squeeze_excitation() -> nn.Module:
    """Channels scaled by a small network of their averages."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.ReLU(),
        _SqueezeExcitation(7, 5, nn.Sigmoid()),
        nn.Conv2d(7, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        _SqueezeExcitation(8, 6, nn.Sigmoid()),
        *_pooled(8, 4),
    )


class _InvertedResidual(nn.Module):
    """Expand, convolve each channel alone, project; a shortcut where the shapes allow it."""

    def __init__(self, fan_in: int, hidden: int, fan_out: int, stride: int, squeezed: int | None) -> None:
        super().__init__()
        activation: type[nn.Module] = nn.Hardswish if squeezed else nn.ReLU6
        attention = [_SqueezeExcitation(hidden, squeezed, nn.Hardsigmoid())] if squeezed else []
        self.branch = nn.Sequential(
            _normalised(fan_in, hidden, 1),
            activation(),
            _normalised(hidden, hidden, 3, stride, groups=hidden),
            activation(),
            *attention,
            _normalised(hidden, fan_out, 1),
        )
        self.residual = stride == 1 and fan_in == fan_out

    def forward(self, x: Image) -> Features:
        out: Tensor = self.branch(x)
        return x + out if self.residual else out


def _mobilenet(activation: nn.Module, squeezed: Sequence[int | None]) -> nn.Module:
    return nn.Sequential(
        _normalised(3, 6, 3, 2),
        activation,
        _InvertedResidual(6, 12, 7, 2, squeezed[0]),
        _InvertedResidual(7, 14, 7, 1, squeezed[1]),
        _InvertedResidual(7, 15, 8, 1, squeezed[2]),
        _normalised(8, 16, 1),
        activation,
        *_pooled(16, 4),
    )


@case(floats((2, 3, 16, 16)), floats((5, 3, 24, 16)))
def mobilenet_v2() -> nn.Module:
    """Inverted residuals with depthwise convolutions and ReLU6."""
    return _mobilenet(nn.ReLU6(), (None, None, None))


@case(floats((2, 3, 16, 16)), floats((5, 3, 24, 16)))
def mobilenet_v3() -> nn.Module:
    """Inverted residuals with depthwise convolutions, hardswish and squeeze-and-excitation."""
    return _mobilenet(nn.Hardswish(), (4, 5, 9))


class _UNet(nn.Module):
    """Ronneberger et al. 2015, "U-Net", arXiv:1505.04597, two levels deep."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self._pair(3, 6, 5), self._pair(5, 8, 7), self._pair(7, 10, 9)
        self.up2 = self._upsample(9, 11, transposed)
        self.merge2 = self._pair(11 + 7, 13, 12)
        self.up1 = self._upsample(12, 14, transposed)
        self.merge1 = self._pair(14 + 5, 15, 16)
        self.head = nn.Conv2d(16, 2, 1)

    @staticmethod
    def _pair(fan_in: int, hidden: int, fan_out: int) -> nn.Module:
        first, second = nn.Conv2d(fan_in, hidden, 3, padding=1), nn.Conv2d(hidden, fan_out, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    @staticmethod
    def _upsample(fan_in: int, fan_out: int, transposed: bool) -> nn.Module:
        if transposed:
            return nn.ConvTranspose2d(fan_in, fan_out, 2, stride=2)
        resize = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        return nn.Sequential(resize, nn.Conv2d(fan_in, fan_out, 1))

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 2 height width"]:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        bottom = self.bottom(F.max_pool2d(coarse, 2))
        coarse = self.merge2(torch.cat([self.up2(bottom), coarse], 1))
        out: Tensor = self.head(self.merge1(torch.cat([self.up1(coarse), fine], 1)))
        return out


@case(floats((2, 3, 16, 16)), floats((4, 3, 12, 20)))
def unet() -> nn.Module:
    """Skips by concatenation, transposed convolutions on the way up."""
    return _UNet(transposed=True)


@case(floats((2, 3, 16, 16)), floats((4, 3, 12, 20)))
def unet_interpolated() -> nn.Module:
    """Skips by concatenation, bilinear interpolation on the way up."""
    return _UNet(transposed=False)


class _ConvNeXtBlock(nn.Module):
    """Liu et al. 2022, "A ConvNet for the 2020s", arXiv:2201.03545."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Image) -> Image:
        rows = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.scale * rows).permute(0, 3, 1, 2)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of images, for which they are moved to the end and back."""

    def forward(self, x: Image) -> Image:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@case(floats((2, 3, 16, 16)), floats((4, 3, 24, 16)))
def convnext() -> nn.Module:
    """Depthwise 7 x 7 convolutions, layer norm with the channels moved last, layer scale, GELU."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 4, stride=4),
        _ChannelNorm(7),
        _ConvNeXtBlock(7, 12),
        _ConvNeXtBlock(7, 13),
        _ChannelNorm(7),
        nn.Conv2d(7, 9, 2, stride=2),
        _ConvNeXtBlock(9, 14),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(9),
        nn.Linear(9, 4),
    )


@case(floats((2, 3, 16, 16)), floats((4, 3, 12, 20)))
def autoencoder() -> nn.Module:
    """Strided convolutions down, transposed ones up."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(8, 7, 3, stride=2, padding=1, output_padding=1),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(7, 3, 4, stride=2, padding=1),
        nn.Tanh(),
    )


@case(floats((2, 3, 16)), floats((4, 3, 20)))
def conv1d() -> nn.Module:
    """Convolutions over time: dilated, circularly padded, grouped and transposed."""
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=2, dilation=2),
        nn.BatchNorm1d(6),
        nn.ELU(),
        nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular", groups=2),
        nn.ELU(),
        nn.ConvTranspose1d(8, 10, 4, stride=2, padding=1, groups=2),
        nn.ELU(),
        nn.MaxPool1d(2),
        nn.Conv1d(10, 7, 3),
        nn.AdaptiveMaxPool1d(1),
        nn.Flatten(),
        nn.Linear(7, 4),
    )


@case(floats((2, 3, 8, 6, 10)), floats((4, 3, 6, 8, 12)))
def conv3d() -> nn.Module:
    """Convolutions over volumes."""
    return nn.Sequential(
        nn.Conv3d(3, 6, 3, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@case(floats((2, 3, 8, 8)), floats((4, 3, 12, 10)))
def prelu() -> nn.Module:
    """Rectifiers with a learned slope per channel: a parameter that must move with the channels."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.PReLU(7),
        nn.Conv2d(7, 6, 3, padding=1),
        nn.PReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 8),
        nn.PReLU(8),
        nn.Linear(8, 4),
    )


@case(floats((2, 3, 8, 8)), floats((4, 3, 12, 10)))
def group_norm() -> nn.Module:
    """Group norm: channels permute within groups, and whole groups among each other."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.GroupNorm(3, 12),
        nn.SiLU(),
        nn.Conv2d(12, 10, 3, padding=1),
        nn.GroupNorm(2, 10),
        nn.SiLU(),
        *_pooled(10, 4),
    )


@case(floats((2, 3, 8, 8)), floats((4, 3, 12, 10)))
def instance_norm() -> nn.Module:
    """Instance norm with affine parameters, without and with running statistics."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.InstanceNorm2d(7, affine=True),
        nn.ReLU(),
        nn.Conv2d(7, 6, 3, padding=1),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.ReLU(),
        *_pooled(6, 4),
    )


@case(floats((2, 3, 6, 8)), floats((4, 3, 7, 5)))
def pixel_shuffle() -> nn.Module:
    """Super-resolution: channels that turn into pixels, then convolved again."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 5, padding=2),
        nn.Tanh(),
        nn.Conv2d(7, 5 * 2 * 2, 3, padding=1),
        nn.PixelShuffle(2),
        nn.Tanh(),
        nn.Conv2d(5, 3, 3, padding=1),
    )
