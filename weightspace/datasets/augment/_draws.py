"""Random numbers keyed by network: whatever else is in the batch, a network's numbers are the same."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_LOW = 0xFFFFFFFF
_STEP, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


class Draws:
    """Random numbers for a batch, one stream per network.

    Every call gives new numbers. Each number is a function of the network's key, of how many calls came before, and of
    its place: 32 bits of a hash of the three, the same on every device. Normal numbers differ between devices by
    rounding.

    Args:
        keys: one per network.

    Shapes:
        ``keys`` (batch,) int64; what is drawn ``(batch, *shape)``, float32, on the device of the keys.

    Reference:
        Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", for counters in place of a state; Giles 2010,
        "Approximating the erfinv function", for normal numbers.

    Example:
        >>> draws = Draws.of(seed=0, count=3)
        >>> draws.uniform(4).shape
        torch.Size([3, 4])
        >>> alone = Draws(Draws.of(seed=0, count=3).keys[1:2])
        >>> bool((alone.uniform(4)[0] == Draws.of(seed=0, count=3).uniform(4)[1]).all())
        True
    """

    def __init__(self, keys: Int[Tensor, " batch"]) -> None:
        self.keys = keys
        self._calls = 0

    @classmethod
    def of(cls, seed: int, count: int, *, epoch: int = 0, device: torch.device | str = "cpu") -> Draws:
        """For networks that are numbered from 0."""
        return cls.for_items(torch.arange(count, device=device), seed=seed, epoch=epoch)

    @classmethod
    def for_items(cls, items: Int[Tensor, " batch"], *, seed: int, epoch: int = 0) -> Draws:
        """For networks with numbers of their own, in an epoch."""
        salt = int.from_bytes(
            hashlib.blake2b(struct.pack("<qq", seed, epoch), digest_size=8).digest(), "little"
        )
        low, high = salt & _LOW, salt >> 32
        if items.device.type == "cpu":
            from weightspace.datasets.augment._kernels import make_keys

            return cls(torch.from_numpy(make_keys(items.numpy(), np.uint32(low), np.uint32(high))))
        return cls(item_keys(items, low, high))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def device(self) -> torch.device:
        """Where numbers are drawn."""
        return self.keys.device

    def uniform(self, *shape: int) -> Float[Tensor, "batch ..."]:
        """Numbers in [0, 1), multiples of 2^-24."""
        count = math.prod(shape)
        if self.device.type != "cpu":
            return uniform_numbers(*self.halves(), count).view(len(self), *shape)
        from weightspace.datasets.augment._kernels import uniform

        return self._filled(uniform, count).view(len(self), *shape)

    def normal(self, *shape: int) -> Float[Tensor, "batch ..."]:
        """Numbers with mean 0 and standard deviation 1; none is beyond 6.4."""
        count = math.prod(shape)
        if self.device.type != "cpu":
            return normal_numbers(*self.halves(), count).view(len(self), *shape)
        from weightspace.datasets.augment._kernels import normal

        return self._filled(normal, count).view(len(self), *shape)

    def _filled(self, fill: Callable[[np.ndarray, int, np.ndarray], None], count: int) -> Tensor:
        self._calls += 1
        out = np.empty((len(self), count), np.float32)
        fill(self.keys.numpy(), self._calls, out)
        return torch.from_numpy(out)

    def together(self, *shape: int) -> Float[Tensor, "..."]:
        """Uniform numbers for the batch as a whole: they depend on all of its networks."""
        digest = hashlib.blake2b(self.keys.cpu().numpy().tobytes(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        whole = Draws(torch.tensor([key], device=self.device))
        whole._calls, self._calls = self._calls, self._calls + 1
        return whole.uniform(*shape)[0]

    def halves(self) -> tuple[Tensor, Tensor]:
        """Both halves of the keys of the next call, as integers below 2^32."""
        self._calls += 1
        salt = (self._calls * _STEP) & _LOW
        low, high = self.keys & _LOW, (self.keys >> 32) & _LOW
        return _mixed(low ^ salt), _mixed((high + salt) & _LOW)


def item_keys(items: Tensor, low: int, high: int) -> Tensor:
    """What the compiled kernel computes, on any device: a key for every number and the two halves of a salt."""
    number, upper = items & _LOW, (items >> 32) & _LOW
    first = _mixed(number ^ low)
    second = _mixed((_mixed((number + high) & _LOW) ^ upper) & _LOW)
    return (second << 32) | first


def uniform_numbers(low: Tensor, high: Tensor, count: int) -> Tensor:
    """What the compiled kernel computes, on any device."""
    return (_bits(low, high, count) >> 8).float() * 2.0**-24


def normal_numbers(low: Tensor, high: Tensor, count: int) -> Tensor:
    """What the compiled kernel computes, on any device, to rounding."""
    bits = _bits(low, high, count)
    tail = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    size = _middle_or_tail(-torch.log(tail * (2.0 - tail))) * (1.0 - tail) * math.sqrt(2.0)
    return torch.where(bits >> 31 == 1, size, -size)


def _middle_or_tail(w: Tensor) -> Tensor:
    from weightspace.datasets.augment._kernels import MIDDLE, TAIL

    return torch.where(
        w < 5.0, _polynomial(MIDDLE, w - 2.5), _polynomial(TAIL, w.clamp_min(0.0).sqrt() - 3.0)
    )


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _bits(low: Tensor, high: Tensor, count: int) -> Tensor:
    at = (torch.arange(count, device=low.device) * _STEP) & _LOW
    return _mixed((_mixed(at ^ low[:, None]) + high[:, None]) & _LOW)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers, which are held in 64 bits: PyTorch's shifts know no unsigned ones."""
    x = x ^ (x >> 16)
    x = (x * _FIRST) & _LOW
    x = x ^ (x >> 15)
    x = (x * _SECOND) & _LOW
    return x ^ (x >> 16)
