"""Multilayer perceptrons, and with them SIREN-like implicit neural representations (INRs)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.nets import _checks
from weightspace.nets._activations import ACTIVATIONS, activate, frequency
from weightspace.nets._dropout import Dropout
from weightspace.nets._network import NETWORKS, Network


@NETWORKS.register("mlp")
class MLP(Network):
    """A multilayer perceptron; with ``activation="sine"`` a SIREN, the standard INR of the field.

    Hidden layers compute ``activation(w0 (W x + b))``, where ``w0`` is 1 but for sine and Gaussian, and then
    dropout; the last layer is linear, and the constant ``output_offset`` is added to what it returns. With
    ``input_shape`` it is a classifier of images, which it flattens.

    Args:
        widths: units per layer, input and output included: ``(2, 32, 32, 1)`` has two hidden layers.
        activation: ``"sine"``, ``"relu"``, ``"tanh"``, ``"gaussian"`` (``exp(-z^2)``), ``"leaky_relu"`` (slope
            0.01), ``"gelu"``, ``"silu"`` or ``"sigmoid"``.
        w0: frequency factor on every hidden layer, used by sine and Gaussian.
        output_offset: constant added after the last layer (DWSNets' INRs use 0.5).
        dropout: rate after every hidden layer, in training; a population may have other rates, see
            :func:`dropout_state`.
        input_shape: of one input, where it is not a vector: ``(1, 28, 28)`` is flattened to 784 features.

    Raises:
        ConfigError: fewer than two widths, a width below 1, an unknown activation, a rate outside [0, 1), or an
            ``input_shape`` of another size than the first width.

    Reference:
        Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation Functions",
        arXiv:2006.09661, section 3.2.

    Example:
        >>> import torch
        >>> net = MLP((2, 32, 32, 1), activation="sine", w0=30.0)
        >>> net(torch.zeros(784, 2)).shape
        torch.Size([784, 1])
        >>> list(net.state_dict())[:2]
        ['layers.0.weight', 'layers.0.bias']
        >>> MLP((784, 64, 10), activation="relu", input_shape=(1, 28, 28))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str = "sine",
        w0: float = 30.0,
        output_offset: float = 0.0,
        dropout: float = 0.0,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ConfigError(f"widths: expected at least two positive layer sizes, found {list(widths)}")
        self.widths = tuple(int(width) for width in widths)
        self.activation = _checks.choice("activation", activation, ACTIVATIONS)
        self.w0 = frequency(activation, w0)
        self.output_offset = float(output_offset)
        self.dropout = _checks.rate("dropout", dropout)
        self.input_shape = (
            self.widths[:1] if input_shape is None else _checks.wholes("input_shape", input_shape)
        )
        if math.prod(self.input_shape) != self.widths[0]:
            raise ConfigError(
                f"input_shape: expected {self.widths[0]} numbers, the first width, found {list(self.input_shape)}"
            )
        self.out_features = self.widths[-1]
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(self.widths))
        self.dropouts = nn.ModuleList(Dropout(self.dropout) for _ in self.widths[1:-1])

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Evaluate the network at ``x``, of shape ``(..., *input_shape)``."""
        if len(self.input_shape) > 1:
            x = x.flatten(-len(self.input_shape))
        *hidden, last = self.layers
        for layer, dropout in zip(hidden, self.dropouts, strict=True):
            x = dropout(activate(self.activation, layer(x), self.w0))
        out: Tensor = last(x)
        return out if self.output_offset == 0.0 else out + self.output_offset

    def arguments(self) -> dict[str, object]:
        """The keyword arguments that build this network again, ready for JSON.

        Those that came later are left out at their defaults: descriptions in files stay as they were.
        """
        found: dict[str, object] = {
            "widths": list(self.widths),
            "activation": self.activation,
            "w0": self.w0,
            "output_offset": self.output_offset,
        }
        if self.dropout:
            found["dropout"] = self.dropout
        if len(self.input_shape) > 1:
            found["input_shape"] = list(self.input_shape)
        return found
