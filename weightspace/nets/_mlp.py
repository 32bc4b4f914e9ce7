"""Multilayer perceptrons, and with them SIREN-like implicit neural representations (INRs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.errors import ConfigError

Activation = Literal["sine", "relu", "tanh", "gaussian"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def _gaussian(x: Tensor) -> Tensor:
    return torch.exp(-(x * x))


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": torch.sin,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gaussian": _gaussian,
}


class MLP(nn.Module):
    """A multilayer perceptron; with ``activation="sine"`` a SIREN, the standard INR of the field.

    Hidden layers compute ``activation(w0 (W x + b))``, where ``w0`` is 1 for ReLU and tanh; the last layer is
    linear, and the constant ``output_offset`` is added to what it returns.

    Args:
        widths: units per layer, input and output included: ``(2, 32, 32, 1)`` has two hidden layers.
        activation: ``"sine"``, ``"relu"``, ``"tanh"`` or ``"gaussian"`` (``exp(-z^2)``).
        w0: frequency factor on every hidden layer, used by sine and Gaussian.
        output_offset: constant added after the last layer (DWSNets' INRs use 0.5).

    Raises:
        ConfigError: fewer than two widths, a width below 1, or an unknown activation.

    Reference:
        Sitzmann et al. 2020, "Implicit Neural Representations with Periodic Activation Functions",
        arXiv:2006.09661, section 3.2.

    Example:
        >>> net = MLP((2, 32, 32, 1), activation="sine", w0=30.0)
        >>> net(torch.zeros(784, 2)).shape
        torch.Size([784, 1])
        >>> list(net.state_dict())[:2]
        ['layers.0.weight', 'layers.0.bias']
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str = "sine",
        w0: float = 30.0,
        output_offset: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ConfigError(f"widths: expected at least two positive layer sizes, found {list(widths)}")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}")
        self.widths = tuple(int(width) for width in widths)
        self.activation = activation
        self.w0 = float(w0) if activation in ("sine", "gaussian") else 1.0
        self.output_offset = float(output_offset)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(self.widths))

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Evaluate the network at ``x``."""
        function = _FUNCTIONS[self.activation]
        *hidden, last = self.layers
        for layer in hidden:
            z = layer(x)
            x = function(z if self.w0 == 1.0 else self.w0 * z)
        out: Tensor = last(x)
        return out if self.output_offset == 0.0 else out + self.output_offset

    def arguments(self) -> dict[str, object]:
        """The keyword arguments that build this network again, ready for JSON."""
        return {
            "widths": list(self.widths),
            "activation": self.activation,
            "w0": self.w0,
            "output_offset": self.output_offset,
        }

    def extra_repr(self) -> str:
        """What ``print`` shows beside the layers."""
        return ", ".join(f"{name}={value}" for name, value in self.arguments().items())
