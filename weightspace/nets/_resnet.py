"""Small residual networks."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.nets import _checks
from weightspace.nets._activations import ACTIVATIONS, activate
from weightspace.nets._dropout import Dropout
from weightspace.nets._network import NETWORKS, Network
from weightspace.nets._norms import norm_layer

_PLAIN = tuple(name for name in ACTIVATIONS if name not in ("sine", "gaussian"))


class BasicBlock(nn.Module):
    """``dropout(activation(norm(conv(activation(norm(conv(x))))) + shortcut(x)))``, both convolutions 3x3.

    The shortcut is the identity, or a 1x1 convolution and a norm where the shape changes.

    Args:
        in_channels: that it reads.
        channels: that it gives.
        stride: of the first convolution and of the shortcut.
        norm: ``"batch"`` or ``"layer"``.
        activation: one of ``ACTIVATIONS``.
        dropout: rate after the block.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, norm: str, activation: str, dropout: float
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=norm != "batch")
        self.norm1 = norm_layer(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=norm != "batch")
        self.norm2 = norm_layer(norm, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            project = nn.Conv2d(in_channels, channels, 1, stride, bias=norm != "batch")
            self.shortcut = nn.Sequential(project, norm_layer(norm, channels))
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch ..."]:
        """The block's feature maps."""
        inner = activate(self.activation, self.norm1(self.conv1(x)))
        summed = self.norm2(self.conv2(inner)) + self.shortcut(x)
        found: Tensor = self.dropout(activate(self.activation, summed))
        return found


@NETWORKS.register("resnet")
class ResNet(Network):
    """A residual network for small images: a 3x3 stem, stages of basic blocks, the mean over pixels, one linear layer.

    Stage s has ``round(channels * width) * 2**s`` channels, and all but the first begin by halving the image.

    Args:
        input_shape: channels, height and width of one image.
        out_features: number of classes.
        blocks: number of basic blocks in each stage; (3, 3, 3) is a ResNet-20.
        channels: of the stem and the first stage.
        width: multiplies ``channels``.
        norm: ``"batch"``, or ``"layer"`` (``GroupNorm`` with one group).
        activation: one of ``ACTIVATIONS`` but sine and Gaussian.
        dropout: rate after every block, in training; a population may have other rates, see
            :func:`dropout_state`.

    Shapes:
        (batch, *input_shape) -> (batch, out_features).

    Raises:
        ConfigError: an argument that makes no network; the sentence names it.

    Reference:
        He et al. 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2, with
        projections where the shape changes (their option B) and the stem's norm and activation.

    Example:
        >>> import torch
        >>> ResNet((3, 32, 32), 10, blocks=(1, 1), channels=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        out_features: int,
        *,
        blocks: Sequence[int] = (1, 1, 1),
        channels: int = 16,
        width: float = 1.0,
        norm: str = "batch",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_shape = _checks.image_shape("input_shape", input_shape)
        self.out_features = _checks.whole("out_features", out_features)
        self.blocks = _checks.wholes("blocks", blocks)
        self.channels = _checks.whole("channels", channels)
        self.width = _checks.positive("width", width)
        self.norm = _checks.choice("norm", norm, ("batch", "layer"))
        self.activation = _checks.choice("activation", activation, _PLAIN)
        self.dropout = _checks.rate("dropout", dropout)
        first = round(self.channels * self.width)
        if first < 1:
            raise ConfigError(
                f"width: expected at least {0.5 / self.channels:g}, for one of {channels} channels, found {width}"
            )
        self._add_layers([first * 2**stage for stage in range(len(self.blocks))])

    def _add_layers(self, channels: Sequence[int]) -> None:
        self.stem = nn.Conv2d(self.input_shape[0], channels[0], 3, 1, 1, bias=self.norm != "batch")
        self.norm_stem = norm_layer(self.norm, channels[0])
        stages, before = [], channels[0]
        for stage, (blocks, after) in enumerate(zip(self.blocks, channels, strict=True)):
            steps = [2 if stage else 1] + [1] * (blocks - 1)
            inputs = [before] + [after] * (blocks - 1)
            stages.append(
                nn.Sequential(
                    *(
                        BasicBlock(entering, after, stride, self.norm, self.activation, self.dropout)
                        for entering, stride in zip(inputs, steps, strict=True)
                    )
                )
            )
            before = after
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(before, self.out_features)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out_features"]:
        """The logits of images."""
        x = activate(self.activation, self.norm_stem(self.stem(x)))
        logits: Tensor = self.classifier(self.stages(x).mean((-2, -1)))
        return logits

    def arguments(self) -> dict[str, object]:
        """The keyword arguments that build this network again, ready for JSON."""
        return {
            "input_shape": list(self.input_shape),
            "out_features": self.out_features,
            "blocks": list(self.blocks),
            "channels": self.channels,
            "width": self.width,
            "norm": self.norm,
            "activation": self.activation,
            "dropout": self.dropout,
        }
