"""Pool features onto smaller orbit types, and write features of smaller types back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightspace.errors import ConfigError
from weightspace.models._orbit_types import Blocks, OrbitType, Reading, closed_subsets, merge

POOLINGS = ("mean", "max", "sum")

Kept = tuple[int, ...]


def check_pooling(pooling: Sequence[str]) -> None:
    """Raise ConfigError unless every name is a known pooling and there is at least one."""
    if isinstance(pooling, str):
        raise ConfigError(f"pooling: expected a sequence of names such as ({pooling!r},), found one string")
    unknown = [name for name in pooling if name not in POOLINGS]
    if unknown or not pooling:
        raise ConfigError(f"pooling: expected some of {', '.join(POOLINGS)}, found {list(pooling)}")


def pool(
    features: Tensor, orbit: OrbitType, wanted: Sequence[Reading], pooling: Sequence[str]
) -> list[list[Tensor]]:
    """Read features (batch, *group sizes, channels) in several ways: one tensor per pooling for each of them.

    Each set of indices is pooled from one that has one index more: a mean of means over full axes is the mean,
    a maximum of maxima the maximum. A reading that keeps everything holds the features themselves, once.
    """
    pooled: dict[Blocks, dict[Kept, list[Tensor]]] = {}
    for blocks in dict.fromkeys(reading.blocks for reading in wanted):
        sets = [tuple(sorted(reading.kept)) for reading in wanted if reading.blocks == blocks]
        pooled[blocks] = _pool_sets(diagonal(features, blocks), merge(orbit, blocks), sets, pooling)
    return [
        [_ordered(x, reading.kept) for x in pooled[reading.blocks][tuple(sorted(reading.kept))]]
        for reading in wanted
    ]


def _pool_sets(
    x: Tensor, orbit: OrbitType, sets: Sequence[Kept], pooling: Sequence[str]
) -> dict[Kept, list[Tensor]]:
    whole = tuple(range(len(orbit)))
    found: dict[Kept, list[Tensor]] = {whole: [x]}
    subsets = [kept for kept in closed_subsets(orbit) if any(set(wanted) <= set(kept) for wanted in sets)]
    first = [kept for kept in subsets if len(kept) == len(whole) - 1]
    if first:
        axes = tuple(1 + next(at for at in whole if at not in kept) for kept in first)
        function = _PoolAxes if torch.compiler.is_compiling() else _PoolAxesForward
        parts = function.apply(x, axes, tuple(pooling))
        for place, kept in enumerate(first):
            found[kept] = list(parts[place * len(pooling) : (place + 1) * len(pooling)])
    for kept in subsets:
        if len(kept) < len(whole) - 1:
            larger = next(other for other in found if len(other) == len(kept) + 1 and set(kept) < set(other))
            axis = 1 + next(at for at, index in enumerate(larger) if index not in kept)
            found[kept] = [_reduce(part, how, axis) for part, how in zip(found[larger], pooling, strict=True)]
    return found


def _ordered(x: Tensor, kept: Kept) -> Tensor:
    """Axes in ascending order of blocks to those of a reading."""
    order = sorted(kept)
    if list(kept) == order:
        return x
    return x.permute(0, *(1 + order.index(block) for block in kept), x.ndim - 1)


def diagonal(x: Tensor, blocks: Blocks) -> Tensor:
    """The view of (batch, *indices, channels) on which the indices of each block are equal."""
    axes = sorted(at for block in blocks for at in block)
    for block in blocks:
        for other in block[1:]:
            x = x.diagonal(0, 1 + axes.index(block[0]), 1 + axes.index(other))
            axes.remove(other)
            x = x.movedim(-1, 1 + axes.index(block[0]))
    return x


def write(orbit: OrbitType, parts: Mapping[Reading, Tensor]) -> Tensor:
    """Add features of smaller types into one type: along what a reading pools, broadcast; on diagonals, alone."""
    by_blocks: dict[Blocks, dict[Kept, Tensor]] = {}
    for reading, x in parts.items():
        order = [reading.kept.index(block) for block in sorted(reading.kept)]
        x = x.permute(0, *(1 + at for at in order), x.ndim - 1)
        by_blocks.setdefault(reading.blocks, {})[tuple(sorted(reading.kept))] = x
    apart: Blocks = tuple((at,) for at in range(len(orbit)))
    whole = _join(len(orbit), by_blocks.pop(apart))
    if not by_blocks:
        return whole
    whole = whole.clone()
    for blocks, terms in by_blocks.items():
        diagonal(whole, blocks).add_(_join(len(blocks), terms))
    return whole


def _join(rank: int, parts: Mapping[Kept, Tensor]) -> Tensor:
    """Add features on subsets of some indices, broadcast along those that they lack.

    Small subsets are added into larger ones first, so that the largest tensor is passed over as rarely as can be.
    """
    total: dict[Kept, Tensor] = {}
    for kept in sorted(parts, key=len):
        part = parts[kept]
        for smaller in [other for other in total if set(other) < set(kept)]:
            part = part + _align(total.pop(smaller), smaller, kept)
        total[kept] = part
    full = tuple(range(rank))
    terms = [_align(part, kept, full) for kept, part in sorted(total.items(), key=lambda item: -len(item[0]))]
    return sum(terms[1:], terms[0])


def _align(x: Tensor, kept: Kept, target: Kept) -> Tensor:
    for at, index in enumerate(target):
        if index not in kept:
            x = x.unsqueeze(1 + at)
    return x


def _reduce(x: Tensor, how: str, axis: int) -> Tensor:
    if how == "mean":
        return x.mean(axis)
    return x.sum(axis) if how == "sum" else x.amax(axis)


class _PoolAxes(torch.autograd.Function):
    """Pool the largest tensor along each of its axes, with one joint backward pass.

    Autograd alone would write a tensor of its size for every axis and pooling, and add them up: 4 times as slow
    for mean and max over two axes. As in ``amax``, tied maxima share the gradient evenly.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, axes: tuple[int, ...], pooling: tuple[str, ...]) -> tuple[Tensor, ...]:
        return tuple(_reduce(x, how, axis) for axis in axes for how in pooling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.axes, ctx.pooling = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *output)
        ctx.save_for_forward(x, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        x, *pooled = ctx.saved_tensors
        cases = [(axis, how) for axis in ctx.axes for how in ctx.pooling]
        found = [
            (axis, how, grad, value)
            for (axis, how), grad, value in zip(cases, gradients, pooled, strict=True)
            if grad is not None
        ]
        evenly = [
            (grad / x.shape[axis] if how == "mean" else grad).unsqueeze(axis)
            for axis, how, grad, _ in found
            if how != "max"
        ]
        total: Tensor | None = None
        if evenly:
            # cloned also where an axis has one unit, and nothing is expanded: the gradient is not ours to add to
            first = evenly[0].expand_as(x).clone(memory_format=torch.contiguous_format)
            total = sum(evenly[1:], first)
        for axis, how, grad, value in found:
            if how == "max":
                hit = _is_maximum(x, value, axis)
                shared = (grad / hit.sum(axis)).unsqueeze(axis)
                # in place, but not into zeros of our own, which are not batched where the gradients are (vmap)
                total = hit * shared if total is None else total.addcmul_(hit, shared)
        return total, None, None


class _PoolAxesForward(_PoolAxes):
    """The same with derivatives in forward mode, which ``torch.compile`` refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        x, *pooled = ctx.saved_tensors
        cases = [(axis, how) for axis in ctx.axes for how in ctx.pooling]
        found = []
        for (axis, how), value in zip(cases, pooled, strict=True):
            if how == "max":
                hit = _is_maximum(x, value, axis)
                found.append((hit * tangent).sum(axis) / hit.sum(axis))
            else:
                found.append(_reduce(tangent, how, axis))
        return tuple(found)


def _is_maximum(x: Tensor, maximum: Tensor, axis: int) -> Tensor:
    # as floats, because summing booleans converts them to integers first, which is slow
    return (x == maximum.unsqueeze(axis)).to(x.dtype)
