"""Dropout for populations: a rate per network, and random bits that depend on a key alone.

Random numbers are a function of (key, position), not of a generator's state: a network's mask is the same
whatever its neighbours in a batch, on any device, and at a step that is repeated after an interruption.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.errors import ConfigError
from weightspace.nets import _checks

_WORD, _HALF = 0xFFFFFFFF, 0x7FFFFFFF
_FACTOR = 0x45D9F3B  # below 2**31, so that in int64 its products with 32 bits do not overflow
_GOLDEN = 0x9E3779B9


def random_keys(
    seed: int, networks: Int64[Tensor, "*batch"], step: int | Int64[Tensor, "*batch"]
) -> Int64[Tensor, "*batch"]:
    """Keys for :func:`dropout_state`: one for each network at a step, from nothing but these three numbers.

    Args:
        seed: of the run.
        networks: numbers of the networks, which they keep wherever they are trained.
        step: of training; one number, or one for each network.

    Example:
        >>> together, alone = random_keys(0, torch.arange(3), step=7), random_keys(0, torch.tensor(2), step=7)
        >>> bool(together[2] == alone)
        True
    """
    key = _folded(_folded(torch.zeros_like(networks), seed & _WORD), (seed >> 32) & _WORD)
    return _folded(_folded(_folded(key, networks & _WORD), networks >> 32), step)


def dropout_state(
    module: nn.Module, keys: Int64[Tensor, "*batch"], rates: Tensor | None = None
) -> dict[str, Tensor]:
    """Buffers that make the dropout of a network a function of keys, for ``torch.func.functional_call``.

    Merge them into the weights of a call in training mode, alone or under ``torch.vmap``; each layer folds its
    place into the key, so that its mask is its own. In evaluation mode they do nothing. Call it outside ``vmap``.

    Args:
        module: a network with :class:`Dropout` layers.
        keys: of :func:`random_keys`.
        rates: of dropout in [0, 1), shaped like ``keys``; None for those of the layers.

    Raises:
        ConfigError: rates of another shape, or outside that range.

    Example:
        >>> from weightspace.nets import MLP, evaluate_batch
        >>> net = MLP((4, 64, 2), activation="relu").train()
        >>> weights = {name: tensor.expand(3, *tensor.shape) for name, tensor in net.state_dict().items()}
        >>> drop = dropout_state(net, random_keys(0, torch.arange(3), step=0), torch.tensor([0.0, 0.2, 0.5]))
        >>> evaluate_batch(net, {**weights, **drop}, torch.ones(8, 4)).shape
        torch.Size([3, 8, 2])
    """
    if rates is not None:
        _check_rates(rates, keys)
    found: dict[str, Tensor] = {}
    layers = [name for name, layer in module.named_modules() if isinstance(layer, Dropout)]
    for place, name in enumerate(layers):
        prefix = f"{name}." if name else ""
        found[f"{prefix}key"] = _folded(keys, place)
        if rates is not None:
            found[f"{prefix}rate"] = rates
    return found


def _check_rates(rates: Tensor, keys: Tensor) -> None:
    if rates.shape != keys.shape:
        raise ConfigError(f"rates: expected shape {list(keys.shape)}, found {list(rates.shape)}")
    wrong = rates[~((rates >= 0.0) & (rates < 1.0))]
    if len(wrong):
        raise ConfigError(f"rates: expected rates of at least 0 and below 1, found {wrong[0].item():g}")


class Dropout(nn.Module):
    """Sets entries to 0 with probability ``p`` in training, and divides the others by ``1 - p``.

    By itself it draws from PyTorch's generator, as ``nn.Dropout`` does. When ``functional_call`` passes the
    buffers of :func:`dropout_state`, the mask is a function of ``key`` and the rate is ``rate``. Neither buffer
    is part of the ``state_dict``.

    Args:
        p: the rate, in [0, 1).

    Raises:
        ConfigError: a rate outside that range.

    Reference:
        Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting".

    Example:
        >>> layer = Dropout(0.5)
        >>> state = {"key": torch.tensor(7), "rate": torch.tensor(0.25)}
        >>> torch.func.functional_call(layer, state, (torch.ones(6),)).count_nonzero() <= 6
        tensor(True)
    """

    key: Tensor | None
    rate: Tensor | None

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = _checks.rate("dropout", p)
        self.register_buffer("key", None, persistent=False)
        self.register_buffer("rate", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x``, thinned out in training."""
        if not self.training or (self.p == 0.0 and self.key is None):
            return x
        if self.key is None:
            return F.dropout(x, self.p)
        rate = torch.full((), self.p, device=x.device) if self.rate is None else self.rate
        kept = keep_mask(self.key, rate, x.shape)
        return torch.where(kept, x / (1.0 - rate).to(x.dtype), 0.0)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"p={self.p}"


def keep_mask(
    key: Int64[Tensor, ""], rate: Tensor, shape: torch.Size | tuple[int, ...]
) -> Bool[Tensor, "..."]:
    """Which entries stay: each with probability ``1 - rate``, a function of the key and the entry's position."""
    words = random_words(key, math.prod(shape)).view(shape)
    return words >= (rate * 2.0**32 - 2.0**31).to(torch.int32)


def random_words(key: Int64[Tensor, ""], count: int) -> Int32[Tensor, " {count}"]:
    """As many numbers, uniform over all of int32: those of a key are a scrambling of 0, 1, 2, ...

    Under vmap all networks share the first scrambling of the positions. In int32, whose products wrap, dropout by
    key takes 1.2 times as long as ``F.dropout`` (in int64 1.9 times; 8 networks of 128x16x15x15 entries, one core).
    """
    low, high = (key & _HALF).to(torch.int32), (key >> 32).to(torch.int32)
    x = torch.arange(count, dtype=torch.int32, device=key.device)
    x = _shifted(_shifted(x) * _FACTOR) * _FACTOR
    x = _shifted(_shifted(x) ^ low) * _FACTOR + high
    return _shifted(_shifted(x) * _FACTOR)


def _shifted(x: Tensor) -> Tensor:
    """The bits of int32 numbers, the upper half added to the lower."""
    return x ^ ((x >> 16) & 0xFFFF)


def _mixed(x: Tensor) -> Tensor:
    """A one-to-one scrambling of 32 bits held in int64."""
    x = ((x ^ (x >> 16)) * _FACTOR) & _WORD
    x = ((x ^ (x >> 16)) * _FACTOR) & _WORD
    return x ^ (x >> 16)


def _folded(keys: Tensor, number: int | Tensor) -> Tensor:
    """Keys of two halves of 31 bits, in which a further number has a part."""
    low = _mixed((_mixed((keys + number) & _WORD) + _GOLDEN) & _WORD)
    high = _mixed(((keys >> 32) ^ low) + _GOLDEN & _WORD)
    return (high >> 1 << 32) | (low & _HALF)
