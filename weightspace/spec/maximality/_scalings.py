r"""Positive scalings, which need no search.

With one log-scale ``a`` for every index of every axis of every tensor,

    f(e^{a} w) = f(w) \text{ for all } w \iff \langle \nabla_w f(w), w \cdot a \rangle = 0 \text{ for all } w,

so that they are a null space, measured at random ``w``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from weightspace.spec._types import Weights, WeightSpec, cell_index
from weightspace.spec.maximality._claimed import patterns
from weightspace.spec.maximality._moves import PRECISION, MissedSymmetry, Move
from weightspace.spec.maximality._network import Network

COTANGENTS = 4  # gradients taken per random network
SMALL = 1e-6  # entries of a basis that count as zero

Place = tuple[str, int, int]
"""A tensor, an axis, an index."""


def missed_scalings(network: Network) -> list[MissedSymmetry]:
    """A basis of the positive scalings that preserve the outputs, less what the spec has."""
    spec = network.spec
    places, spread = _coordinates(spec)
    slopes = _slopes(network, 2 * COTANGENTS + len(spread))
    # what no output depends on may scale as it likes, and is not counted
    counts = slopes.abs().amax(0) > PRECISION * slopes.abs().max()
    spread = spread * counts
    used = spread.any(1)
    places = [place for place, wanted in zip(places, used.tolist(), strict=True) if wanted]
    spread = spread[used]
    known = _orthonormal(
        torch.cat([patterns(spec, "positive").log() * counts, _common(spec, slopes, counts)])
    )
    missed = []
    for direction in _reduced_rows(_null_space(slopes @ spread.T)):
        logs = direction @ spread
        rest = logs - (logs @ known.T) @ known
        if rest.norm() <= SMALL * max(1.0, direction.norm().item()):
            continue  # the spec has it, or all indices of one axis undo those of another
        change = network.change(_rescale(spec, (0.5 * logs / logs.abs().max()).exp()))
        if change <= PRECISION:
            known = torch.cat([known, rest[None] / rest.norm()])
            missed.append(MissedSymmetry("positive", _moves(places, direction), change))
    return missed


def _rescale(spec: WeightSpec, factors: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: spec.unflatten(spec.flatten(weights) * factors)


def _moves(places: Sequence[Place], direction: Tensor) -> tuple[Move, ...]:
    """One move for all indices of an axis that have the same power; that of the first move is 1."""
    direction = direction / direction[direction.abs() > SMALL][0]
    units: dict[tuple[str, int, float], list[int]] = {}
    for (tensor, axis, at), power in zip(places, direction.tolist(), strict=True):
        if abs(power) > SMALL:
            units.setdefault((tensor, axis, round(power, 6)), []).append(at)
    return tuple(
        Move(tensor, axis, (0,), 1, tuple(found), power) for (tensor, axis, power), found in units.items()
    )


# -- log-scales --------------------------------------------------------------------------------------------


def _coordinates(spec: WeightSpec) -> tuple[list[Place], Tensor]:
    """A log-scale for every index of every axis, and which parameters each one multiplies, (scales, P).

    Not of running statistics: they follow what they were estimated from.
    """
    places, rows = [], []
    for name, tensor, entries in _entries(spec):
        index = entries.reshape(tensor.shape or (1,))
        for axis, size in enumerate(index.shape if tensor.kind == "parameter" else ()):
            if size > 1 or (axis == 0 and tensor.numel == 1):
                places += [(name, axis, at) for at in range(size)]
                rows += [index.select(axis, at) for at in range(size)]
    return places, _masks(spec, rows)


def _common(spec: WeightSpec, slopes: Tensor, counts: Tensor) -> Tensor:
    """Preserving scalings that treat all of a cell alike: of groups of size 1, which a spec leaves out."""
    cells = [
        entries[torch.from_numpy(cell_index(cell)).reshape(-1)]
        for _, tensor, entries in _entries(spec)
        if tensor.kind == "parameter"
        for cell in tensor.cells
    ]
    held = _masks(spec, cells) * counts
    held = held[held.any(1)]
    return _null_space(slopes @ held.T) @ held


def _entries(spec: WeightSpec) -> Iterable[tuple[str, Any, Tensor]]:
    """Every tensor and where its entries stand among all."""
    every = torch.arange(spec.num_parameters).split([tensor.numel for tensor in spec.tensors.values()])
    return zip(spec.tensors, spec.tensors.values(), every, strict=True)


def _masks(spec: WeightSpec, rows: Sequence[Tensor]) -> Tensor:
    masks = torch.zeros(len(rows), spec.num_parameters, dtype=torch.float64)
    for mask, row in zip(masks, rows, strict=True):
        mask[row.reshape(-1)] = 1.0
    return masks


# -- gradients ---------------------------------------------------------------------------------------------


class _Differentiable(TorchFunctionMode):
    """``Program.run`` turns gradients off; within this context that has no effect."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return None if func is torch._C._set_grad_enabled else func(*args, **(kwargs or {}))


def _slopes(network: Network, count: int) -> Tensor:
    """Derivatives of random sums of the outputs by the parameters' logarithms, at random weights, (rows, P)."""
    spec = network.spec
    rows: list[Tensor] = []
    for number in range(-(-count // COTANGENTS)):
        weights = network.draw(number)
        moving = [name for name, tensor in spec.tensors.items() if tensor.kind == "parameter"]
        leaves = [weights[name].requires_grad_() for name in moving]
        with torch.enable_grad(), _Differentiable():
            results = [torch.where(out.isfinite(), out, 0.0) for out in network.run(weights)]
        for _ in range(COTANGENTS):
            cotangents = [
                torch.randn(out.shape, generator=network.generator, dtype=out.dtype) for out in results
            ]
            found = torch.autograd.grad(results, leaves, cotangents, retain_graph=True, allow_unused=True)
            slopes = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
            slopes |= {
                name: slope * leaf.detach()
                for name, leaf, slope in zip(moving, leaves, found, strict=True)
                if slope is not None
            }
            row = spec.flatten(slopes).detach()
            rows.append(row / row.norm().clamp_min(1e-300))
    return torch.stack(rows)


# -- linear algebra ----------------------------------------------------------------------------------------


def _null_space(rows: Tensor) -> Tensor:
    """A basis of what all rows vanish on, (dimension, scales)."""
    # columns of one size: parameters that matter little would be taken for ones that do not matter
    sizes = rows.norm(dim=0)
    _, values, basis = torch.linalg.svd(rows / sizes, full_matrices=True)
    rank = int((values > PRECISION * values.amax()).sum()) if len(values) else 0
    return basis[rank:] / sizes


def _orthonormal(rows: Tensor) -> Tensor:
    sizes = rows.norm(dim=1, keepdim=True)
    _, values, basis = torch.linalg.svd(rows[sizes[:, 0] > 0] / sizes[sizes > 0, None], full_matrices=False)
    return basis[values > PRECISION * values.amax()] if len(values) else basis


def _reduced_rows(rows: Tensor) -> Tensor:
    """The reduced row echelon form, from the last column on: few entries, and those are ratios of powers."""
    rows = rows / rows.norm(dim=1, keepdim=True)
    done = 0
    for column in reversed(range(rows.shape[1])):
        if done == len(rows):
            break
        best = done + int(rows[done:, column].abs().argmax())
        if rows[best, column].abs() < SMALL:
            continue
        rows[[done, best]] = rows[[best, done]]
        rows[done] /= rows[done, column].clone()
        factors = rows[:, column].clone()
        factors[done] = 0.0
        rows -= factors[:, None] * rows[done]
        done += 1
    return torch.where(rows.abs() < SMALL, 0.0, rows)
