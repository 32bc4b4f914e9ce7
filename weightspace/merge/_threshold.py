"""The k-th largest magnitude of a whole network, exactly, in passes over its tensors and without sorting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor

DIGITS = {torch.float32: (12, 19), torch.float64: (12, 17, 17, 17)}
"""Bits of a magnitude that each pass tells apart; of the first, which counts all numbers, few enough for the cache."""


def largest(
    rows: Callable[[], Iterable[list[Tensor]]], ranks: list[int], dtype: torch.dtype, device: torch.device
) -> list[float]:
    """For several streams of numbers, the magnitude that has a given rank in each.

    The bits of floating-point numbers that are not negative are in the order of the numbers. So the first pass
    counts how many start with which bits, which says with what bits the one of that rank starts; the next
    looks at the bits behind those, of the numbers that start so, and so on.

    Args:
        rows: starts a pass: blocks of all streams, side by side, none of them negative.
        ranks: per stream, 1 for the largest.
        dtype: of the blocks, float32 or float64.
        device: of the blocks.

    Returns:
        Per stream, its number of that rank.
    """
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    found, left = [0] * len(ranks), list(ranks)
    shift = sum(DIGITS[dtype])
    for place, digit in enumerate(DIGITS[dtype]):
        shift -= digit
        counts = [torch.zeros(1 << digit, dtype=torch.long, device=device) for _ in ranks]
        for blocks in rows():
            for count, block, prefix in zip(counts, blocks, found, strict=True):
                _count(count, block.view(whole) >> shift, digit, prefix if place else None)
        for at, count in enumerate(counts):
            next_digit, left[at] = _pick(count, left[at])
            found[at] = found[at] << digit | next_digit
    return [torch.tensor(bits, dtype=whole).view(dtype).item() for bits in found]


def _count(count: Tensor, bits: Int[Tensor, "elements"], digit: int, prefix: int | None) -> None:
    """Add how often each last digit occurs, among numbers that start with the bits found so far."""
    if prefix is None:
        count += torch.bincount(bits, minlength=len(count))
    else:
        last = (bits[(bits >> digit) == prefix] & ((1 << digit) - 1)).long()
        count.index_add_(0, last, torch.ones_like(last))


def _pick(count: Tensor, rank: int) -> tuple[int, int]:
    """The digit of the number of that rank, and its rank among those with that digit."""
    above = count.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    before = int(above[place - 1]) if place else 0
    return len(count) - 1 - place, rank - before
