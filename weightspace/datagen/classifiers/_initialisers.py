"""Initial parameters of whole populations, each network from its own stream of random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import nn

from weightspace.nets import Network

Initialiser = Literal[
    "pytorch",
    "glorot_uniform",
    "glorot_normal",
    "he_uniform",
    "he_normal",
    "lecun_normal",
    "orthogonal",
    "normal",
    "truncated_normal",
]
INITIALISERS: tuple[str, ...] = get_args(Initialiser)

_PLAIN_DEVIATION = 0.05  # of normal and truncated_normal, as in Keras
_CUT = 0.87962566103423978  # standard deviation of a standard normal cut at +-2

Draw = Callable[[np.random.Generator, tuple[int, ...], int, int], np.ndarray]


def initial_weights(
    net: Network,
    seed: int,
    keys: Int64[np.ndarray, " networks"],
    codes: Int64[np.ndarray, " networks"],
    scales: np.ndarray,
) -> Float32[np.ndarray, "networks parameters"]:
    """Initial parameters and statistics, in the order of ``net.state_dict()``, every tensor row-major.

    Weights of linear, convolutional, recurrent and embedding layers are drawn; biases are zero, but uniform in
    +-1/sqrt(fan_in) for ``"pytorch"``; norms start at the identity, and running statistics at 0 and 1.

    Args:
        net: the architecture.
        seed: of the recipe.
        keys: one per network: equal keys give equal random numbers.
        codes: places in ``INITIALISERS``.
        scales: (networks,) multiply the weights.

    Reference:
        Glorot and Bengio 2010; He et al. 2015, arXiv:1502.01852; LeCun et al. 1998; Saxe et al. 2014,
        arXiv:1312.6120. ``normal`` and ``truncated_normal`` have standard deviation 0.05 (the latter cut at twice
        that), Keras' default.
    """
    constant = _constants(net)
    layers = _layers(net)
    found = np.empty((len(keys), sum(tensor.numel() for tensor in net.state_dict().values())), np.float32)
    for row, (key, code, scale) in enumerate(zip(keys, codes, scales, strict=True)):
        # one network after the other: its numbers are a stream of their own
        random = np.random.Generator(np.random.Philox(key=[seed, int(key)]))
        parts = [
            _drawn(random, INITIALISERS[code], layers[name], shape, float(scale))
            if name in layers
            else constant[name]
            for name, shape in ((name, tuple(tensor.shape)) for name, tensor in net.state_dict().items())
        ]
        found[row] = np.concatenate([np.ravel(part) for part in parts])
    return found


def _constants(net: Network) -> dict[str, np.ndarray]:
    """Tensors of norms, which are not drawn."""
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def _layers(net: Network) -> dict[str, nn.Module]:
    """The layer of each tensor that is drawn."""
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.RNNCellBase)
    return {
        f"{prefix}.{name}" if prefix else name: layer
        for prefix, layer in net.named_modules()
        if isinstance(layer, kinds)
        for name, _ in layer.named_parameters(recurse=False)
    }


def _drawn(
    random: np.random.Generator, name: str, layer: nn.Module, shape: tuple[int, ...], scale: float
) -> np.ndarray:
    if name == "pytorch":
        values, is_weight = _pytorch(random, layer, shape), len(shape) > 1
        return values * (scale if is_weight else 1.0)
    if len(shape) == 1:
        return np.zeros(shape)
    receptive = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
    if isinstance(layer, nn.Embedding):  # it selects a row: what goes out is its features
        fan_in, fan_out = shape[1], shape[1]
    return scale * _DRAWS[name](random, shape, fan_in, fan_out)


def _pytorch(random: np.random.Generator, layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """The defaults of PyTorch's layers: uniform in +-1/sqrt(fan_in), recurrent ones in +-1/sqrt(hidden)."""
    if isinstance(layer, nn.Embedding):
        return random.standard_normal(shape)
    if isinstance(layer, nn.RNNCellBase):
        fan_in = layer.hidden_size
    else:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        fan_in = math.prod(weight.shape[1:])
    return _uniform(random, shape, 1.0 / math.sqrt(fan_in))


def _uniform(random: np.random.Generator, shape: tuple[int, ...], bound: float) -> np.ndarray:
    return random.uniform(-bound, bound, shape)


def _normal(random: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return deviation * random.standard_normal(shape)


def _truncated(random: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    values = random.standard_normal(shape)
    while (outside := np.abs(values) > 2.0).any():
        values[outside] = random.standard_normal(int(outside.sum()))
    return deviation * values


def _orthogonal(random: np.random.Generator, shape: tuple[int, ...], fan_in: int, fan_out: int) -> np.ndarray:
    rows, columns = shape[0], math.prod(shape[1:])
    q, r = np.linalg.qr(random.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)  # else the signs are not uniform
    return (q if rows >= columns else q.T).reshape(shape)


_DRAWS: dict[str, Draw] = {
    "glorot_uniform": lambda g, shape, i, o: _uniform(g, shape, math.sqrt(6.0 / (i + o))),
    "glorot_normal": lambda g, shape, i, o: _truncated(g, shape, math.sqrt(2.0 / (i + o)) / _CUT),
    "he_uniform": lambda g, shape, i, o: _uniform(g, shape, math.sqrt(6.0 / i)),
    "he_normal": lambda g, shape, i, o: _truncated(g, shape, math.sqrt(2.0 / i) / _CUT),
    "lecun_normal": lambda g, shape, i, o: _truncated(g, shape, math.sqrt(1.0 / i) / _CUT),
    "orthogonal": _orthogonal,
    "normal": lambda g, shape, i, o: _normal(g, shape, _PLAIN_DEVIATION),
    "truncated_normal": lambda g, shape, i, o: _truncated(g, shape, _PLAIN_DEVIATION),
}
