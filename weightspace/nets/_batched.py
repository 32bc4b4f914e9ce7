"""Whole populations at once: build a network from its description, evaluate many of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.nets._network import NETWORKS, Network
from weightspace.nets._norms import statistic_names

PRESETS: dict[str, dict[str, Any]] = {
    # 32 -> 15 -> 7 -> 3 pixels: the authors' layers are Keras' own, which do not pad
    "small-cnn-zoo": {
        "kind": "cnn",
        "arguments": {
            "input_shape": [1, 32, 32],
            "channels": [16, 16, 16],
            "out_features": 10,
            "kernel_size": 3,
            "stride": 2,
            "padding": 0,
            "pooling": "mean",
        },
    },
    "resnet-20": {
        "kind": "resnet",
        "arguments": {"input_shape": [3, 32, 32], "out_features": 10, "blocks": [3, 3, 3], "channels": 16},
    },
}
"""Descriptions of published networks, for :func:`build`."""


def architecture_of(module: nn.Module) -> dict[str, Any] | None:
    """The JSON description from which :func:`build` makes ``module`` again; None for a foreign module."""
    for kind, cls in NETWORKS.items():
        if type(module) is cls:
            return {"kind": kind, "arguments": cls.arguments(module)}
    return None


def build(architecture: Mapping[str, Any]) -> Network:
    """Build a network from its JSON description (with fresh parameters).

    Raises:
        ConfigError: an unknown kind, or arguments that it does not take.

    Example:
        >>> build({"kind": "mlp", "arguments": {"widths": [2, 8, 1]}}).input_shape
        (2,)
        >>> sum(tensor.numel() for tensor in build(PRESETS["small-cnn-zoo"]).parameters())
        4970
    """
    kind = architecture.get("kind")
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise ConfigError(f"architecture: expected kind {' or '.join(NETWORKS)}, found {kind!r}")
    if not isinstance(architecture.get("arguments"), Mapping):
        raise ConfigError(
            f"architecture: expected {{kind: {kind}, arguments: {{...}}}}, found {dict(architecture)!r}"
        )
    try:
        return NETWORKS[kind](**architecture["arguments"])
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"architecture: wrong arguments for kind {kind!r}: {error}") from None


def evaluate_batch(
    module: nn.Module, weights: Mapping[str, Tensor], inputs: Shaped[Tensor, "..."]
) -> Float[Tensor, "networks ..."]:
    """Evaluate many networks of one architecture on the same inputs.

    Args:
        module: supplies the computation, and what is missing in ``weights``; its own parameters are not used.
        weights: tensors with one leading axis of networks; buffers too (running statistics, ``dropout_state``).
        inputs: what every network is given; gradients flow to it and to the weights.

    Shapes:
        inputs (points, in_features) -> (networks, points, out_features) for an MLP.
    """

    def one(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(module, parameters, (inputs,))
        return output

    result: Tensor = torch.vmap(one)({**_statistics(module, weights), **weights})
    return result


def _statistics(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's own running statistics, once for each network: a batch norm in training replaces them."""
    found = {name: module.get_buffer(name) for name in statistic_names(module)}
    networks = next(iter(weights.values())).shape[:1] if found else ()
    return {name: buffer.expand(*networks, *buffer.shape) for name, buffer in found.items()}


def forward_and_statistics(
    module: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """One network's output, and the running statistics after it, in training those that the inputs have moved.

    A pure function: neither ``module`` nor ``weights`` is changed. It runs under ``torch.vmap`` (then pass the
    statistics in ``weights``), and under ``torch.func.grad`` with ``has_aux=True``.

    Args:
        module: supplies the computation, and what is missing in ``weights``.
        weights: of one network; buffers too (running statistics, ``dropout_state``).
        inputs: a batch.

    Returns:
        The output; and by name the statistics of its :class:`BatchNorm` layers, detached.

    Example:
        >>> from weightspace.nets import CNN
        >>> net = CNN((1, 8, 8), [4], 2, norm="batch").train()
        >>> output, statistics = forward_and_statistics(net, net.state_dict(), torch.randn(6, 1, 8, 8))
        >>> list(statistics), bool(net.norms[0].running_mean.any())
        (['norms.0.running_mean', 'norms.0.running_var'], False)
    """
    names = statistic_names(module)
    # functional_call leaves in the dictionary what a module put in the place of a buffer
    state = {**{name: module.get_buffer(name) for name in names}, **weights}
    output: Tensor = torch.func.functional_call(module, state, (inputs,))
    return output, {name: state[name] for name in names}


def coordinate_grid(shape: Sequence[int]) -> Float[Tensor, "points dims"]:
    """Coordinates of a signal's samples, in [-1, 1] with the ends included, row-major.

    The last column is the fastest: for an image the columns are (row, column).

    Example:
        >>> coordinate_grid((2, 2)).tolist()
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    axes = [torch.linspace(-1.0, 1.0, size) if size > 1 else torch.zeros(1) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(shape))
