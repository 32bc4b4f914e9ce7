"""What all networks of zoos have in common: a description in JSON, and inputs to try them with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightspace.configuration import Registry


class Network(nn.Module):
    """A small network of which zoos are made; :func:`build` makes it again from its :meth:`arguments`.

    Attributes:
        kind: under which it is registered in ``NETWORKS``.
        input_shape: of one input, without the batch axis.
        out_features: size of the output: classes of a classifier, channels of a signal.
    """

    kind: str
    input_shape: tuple[int, ...]
    out_features: int

    def arguments(self) -> dict[str, object]:
        """The keyword arguments that build this network again, ready for JSON."""
        raise NotImplementedError(f"{type(self).__name__}: write arguments()")

    def example_inputs(self, batch: int = 2) -> Tensor:
        """Inputs that the network accepts, ``(batch, *input_shape)``, of zeros: to trace it with."""
        return torch.zeros(batch, *self.input_shape)

    def random_inputs(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Inputs that the network accepts, ``(batch, *input_shape)``, uniform in [-1, 1]."""
        return torch.rand(batch, *self.input_shape, generator=generator) * 2.0 - 1.0

    def extra_repr(self) -> str:
        """What ``print`` shows beside the layers."""
        return ", ".join(f"{name}={value}" for name, value in self.arguments().items())


NETWORKS: Registry[type[Network]] = Registry("network", "kind")
"""The networks that :func:`build` makes; ``@NETWORKS.register("kind")`` adds one."""
