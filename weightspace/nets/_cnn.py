"""Convolutional classifiers of sampled architecture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.errors import ConfigError
from weightspace.nets import _checks
from weightspace.nets._activations import ACTIVATIONS, activate, frequency
from weightspace.nets._dropout import Dropout
from weightspace.nets._network import NETWORKS, Network
from weightspace.nets._norms import NORMS, norm_layer

Pooling = Literal["mean", "max", "flatten"]
Shortcut = Literal["projection", "shared"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
SHORTCUTS: tuple[str, ...] = get_args(Shortcut)

Size = tuple[int, int]


class Projection(nn.Conv2d):
    """A 1x1 convolution that brings feature maps to other channels and another size.

    It reads pixels ``stride`` apart; what is too small is padded with zeros first, what is too large cut at the
    edges. Without bias, since what it is added to has one.

    Args:
        in_channels: that it reads.
        out_channels: that it gives.
        stride: between the pixels that it reads.
        margins: pixels to pad left, right, at the top and at the bottom; negative ones are cut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, margins: Sequence[int]) -> None:
        super().__init__(in_channels, out_channels, 1, stride=stride, bias=False)
        self.margins = list(margins)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch ..."]:
        """Project every pixel that is read."""
        wider, narrower = ([pick(margin, 0) for margin in self.margins] for pick in (max, min))
        # one after the other: what is cut on one side may be more than there was before the other was padded
        for margins in (wider, narrower):
            x = F.pad(x, margins) if any(margins) else x
        return super().forward(x)


def add_shared(
    x: Float[Tensor, "batch channels height width"], earlier: Float[Tensor, "batch earlier height width"]
) -> Float[Tensor, "batch channels height width"]:
    """``x`` with the channels of ``earlier`` added to as many of its own as both have."""
    shared = min(x.shape[1], earlier.shape[1])
    summed = x[:, :shared] + earlier[:, :shared]
    return summed if shared == x.shape[1] else torch.cat([summed, x[:, shared:]], 1)


@NETWORKS.register("cnn")
class CNN(Network):
    """A convolutional classifier: so many convolutions, pooling, one linear layer.

    Layer i computes ``dropout(activation(w0 (norm(conv(x)) + shortcut)))``. The convolution has no bias before a
    batch norm, which would take it away again. The arguments of which there is one per layer may be given once
    for all.

    Args:
        input_shape: channels, height and width of one image.
        channels: of each convolution; as many as there are layers.
        out_features: number of classes.
        kernel_size: per layer.
        stride: per layer.
        padding: per layer; pixels of zeros on each side, or ``"same"`` for ``kernel_size // 2``.
        activation: per layer, one of ``ACTIVATIONS``.
        w0: frequency factor of sine and Gaussian.
        norm: ``"none"``, ``"batch"``, or ``"layer"`` (``GroupNorm`` with one group).
        residual: per layer, number of the earlier layer whose output is added to its own before the activation, -1
            for none; True for the layer before (from the second layer on), False for none at all.
        shortcut: how it is added. ``"projection"``: as it is where the shapes agree, else through a
            :class:`Projection`. ``"shared"``: the channels that both have, of images that keep their size.
        pooling: ``"mean"`` or ``"max"`` over all pixels, or ``"flatten"``.
        dropout: rate after every layer, in training; a population may have other rates, see
            :func:`dropout_state`.

    Shapes:
        (batch, *input_shape) -> (batch, out_features).

    Raises:
        ConfigError: an argument that makes no network (channels below 1, a kernel larger than the padded image
            that it reads, a residual from a later layer); the sentence names it.

    Reference:
        Unterthiner et al. 2020, "Predicting Neural Network Accuracy from Weights", arXiv:2002.11448: three 3x3
        convolutions of 16 channels, stride 2, without padding, the mean over pixels, 32x32 grey images
        (``PRESETS["small-cnn-zoo"]``; that nothing is padded is read from the authors' code). Their dropout comes
        after the activation, as here; the batch norm that their code offers after the dropout, unlike here.
        Kofinas et al. 2024, "Graph Neural Networks for Learning Equivariant Representations of Neural Networks",
        arXiv:2403.12143 (CNN Wild Park; from the authors' code): an activation per layer, ``padding="same"``, stride 1,
        residuals from any layer but the one before, ``shortcut="shared"``.

    Example:
        >>> net = CNN((3, 32, 32), (8, 16, 16), 10, kernel_size=(5, 3, 3), norm="batch", residual=True)
        >>> net(torch.zeros(2, 3, 32, 32)).shape, net.sizes
        (torch.Size([2, 10]), ((32, 32), (32, 32), (32, 32)))
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: Sequence[int],
        out_features: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = "same",
        activation: str | Sequence[str] = "relu",
        w0: float = 1.0,
        norm: str = "none",
        residual: bool | Sequence[int] = False,
        shortcut: str = "projection",
        pooling: str = "mean",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_shape = _checks.image_shape("input_shape", input_shape)
        self.channels = _checks.wholes("channels", channels)
        self.out_features = _checks.whole("out_features", out_features)
        layers = len(self.channels)
        self.kernel_size = _checks.wholes(
            "kernel_size", _checks.per_layer("kernel_size", kernel_size, layers)
        )
        self.stride = _checks.wholes("stride", _checks.per_layer("stride", stride, layers))
        self.padding = _paddings(padding, self.kernel_size)
        self.activation = tuple(
            _checks.choice("activation", name, ACTIVATIONS)
            for name in _checks.per_layer("activation", activation, layers)
        )
        self.w0 = _checks.positive("w0", w0)
        self.norm = _checks.choice("norm", norm, NORMS)
        self.residual = _sources(residual, layers)
        self.shortcut = _checks.choice("shortcut", shortcut, SHORTCUTS)
        self.pooling = _checks.choice("pooling", pooling, POOLINGS)
        self.dropout = _checks.rate("dropout", dropout)
        self.sizes = self._feature_sizes()
        self._add_layers()

    def _add_layers(self) -> None:
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*pair, *how, bias=self.norm != "batch")
            for pair, how in zip(
                pairwise((self.input_shape[0], *self.channels)),
                zip(self.kernel_size, self.stride, self.padding, strict=True),
                strict=True,
            )
        )
        self.norms = nn.ModuleList(norm_layer(self.norm, channels) for channels in self.channels)
        self.shortcuts = nn.ModuleList(self._shortcut(layer) for layer in range(len(self.channels)))
        self.dropouts = nn.ModuleList(Dropout(self.dropout) for _ in self.channels)
        height, width = self.sizes[-1]
        pixels = height * width if self.pooling == "flatten" else 1
        self.classifier = nn.Linear(self.channels[-1] * pixels, self.out_features)

    def _feature_sizes(self) -> tuple[Size, ...]:
        """Height and width after each layer."""
        sizes: list[Size] = []
        height, width = self.input_shape[1:]
        for layer, (kernel, stride, padding) in enumerate(
            zip(self.kernel_size, self.stride, self.padding, strict=True)
        ):
            room = min(height, width) + 2 * padding
            if kernel > room:
                raise ConfigError(
                    f"kernel_size[{layer}]: expected at most {room}, the size of the image that layer {layer} reads "
                    f"({height}x{width}, padding {padding}), found {kernel}"
                )
            height, width = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
            sizes.append((height, width))
        return tuple(sizes)

    def _shortcut(self, layer: int) -> nn.Module:
        source = self.residual[layer]
        if source < 0:
            return nn.Identity()
        size, to = self.sizes[source], self.sizes[layer]
        if self.shortcut == "shared":
            if size != to:
                raise ConfigError(
                    f"residual[{layer}]: expected a layer whose images have {to[0]}x{to[1]} pixels for shortcut "
                    f"'shared', found layer {source} with {size[0]}x{size[1]}"
                )
            return nn.Identity()
        if size == to and self.channels[source] == self.channels[layer]:
            return nn.Identity()
        return self._projection(source, layer)

    def _projection(self, source: int, layer: int) -> Projection:
        """One that reads, for each pixel of a layer, the one in the middle of what it sees of an earlier layer."""
        stride, twice_start = 1, 0
        for passed in range(source + 1, layer + 1):
            twice_start += stride * (self.kernel_size[passed] - 1 - 2 * self.padding[passed])
            stride *= self.stride[passed]
        before = -(twice_start // 2)
        height, width = (
            stride * (to - 1) + 1 - size - before
            for size, to in zip(self.sizes[source], self.sizes[layer], strict=True)
        )
        margins = before, width, before, height
        return Projection(self.channels[source], self.channels[layer], stride, margins)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out_features"]:
        """The logits of images."""
        outputs: list[Tensor] = []
        for layer, source in enumerate(self.residual):
            x = self.norms[layer](self.convolutions[layer](x))
            if source >= 0:
                x = add_shared(x, self.shortcuts[layer](outputs[source]))
            name = self.activation[layer]
            x = self.dropouts[layer](activate(name, x, frequency(name, self.w0)))
            outputs.append(x)
        logits: Tensor = self.classifier(self._pooled(x))
        return logits

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pooling == "flatten":
            return x.flatten(1)
        return x.mean((-2, -1)) if self.pooling == "mean" else x.amax((-2, -1))

    def arguments(self) -> dict[str, object]:
        """The keyword arguments that build this network again, ready for JSON: one value per layer throughout."""
        return {
            "input_shape": list(self.input_shape),
            "channels": list(self.channels),
            "out_features": self.out_features,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "activation": list(self.activation),
            "w0": self.w0,
            "norm": self.norm,
            "residual": list(self.residual),
            "shortcut": self.shortcut,
            "pooling": self.pooling,
            "dropout": self.dropout,
        }


def _paddings(padding: Any, kernels: Sequence[int]) -> tuple[int, ...]:
    if padding == "same":
        return tuple(kernel // 2 for kernel in kernels)
    if isinstance(padding, str):
        raise ConfigError(f"padding: expected 'same' or pixels for each layer, found {padding!r}")
    found = _checks.wholes("padding", _checks.per_layer("padding", padding, len(kernels)), 0)
    for layer, (pixels, kernel) in enumerate(zip(found, kernels, strict=True)):
        if pixels >= kernel:
            raise ConfigError(f"padding[{layer}]: expected less than the kernel's {kernel}, found {pixels}")
    return found


def _sources(residual: Any, layers: int) -> tuple[int, ...]:
    """For each layer the earlier one whose output is added to its own; -1 for none."""
    if isinstance(residual, bool):
        return tuple(layer - 1 if residual else -1 for layer in range(layers))
    if isinstance(residual, str) or not isinstance(residual, Sequence):
        raise ConfigError(f"residual: expected true, false or one layer for each, found {residual!r}")
    found = _checks.wholes("residual", residual, -1, layers)
    for layer, source in enumerate(found):
        if source >= layer:
            raise ConfigError(f"residual[{layer}]: expected an earlier layer or -1, found {source}")
    return found
