"""Check a spec against the module that it describes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.errors import SpecError
from weightspace.spec._elements import act, random_element
from weightspace.spec._types import Element, Weights, WeightSpec


@dataclass(frozen=True)
class VerifyReport:
    """How much the output of a module changes under the symmetries that its spec claims.

    Args:
        max_relative_change: worst change over all draws, relative to the largest absolute output.
        by_symmetry: worst change per group (``"permutation(hidden0)"``) and per scaling, each alone.
        illegal_change: change under a permutation of a single axis of a single tensor, which is no symmetry:
            near zero means that the check could not have found an error.
    """

    max_relative_change: float
    by_symmetry: dict[str, float]
    illegal_change: float

    def raise_if_wrong(self, tolerance: float = 1e-9) -> VerifyReport:
        """Raise unless every symmetry holds; returns the report itself.

        Raises:
            SpecError: names the symmetries whose change is above ``tolerance``.
        """
        wrong = [
            f"{name} ({change:.1e})" for name, change in self.by_symmetry.items() if not change <= tolerance
        ]
        if wrong or not self.max_relative_change <= tolerance:
            names = ", ".join(wrong) or f"their combination ({self.max_relative_change:.1e})"
            raise SpecError(
                f"spec: the module's output changes under {names}; expected at most {tolerance:.0e}"
            )
        return self


def verify(
    spec: WeightSpec,
    module: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    *,
    draws: int = 4,
    seed: int = 0,
) -> VerifyReport:
    """Draw group elements and measure how much the module's output changes: it should not.

    A float64 copy of ``module`` gets random parameters and statistics first, because a fresh initialisation
    hides errors (biases of zero, running means of zero). ``module`` itself is not touched.

    Args:
        spec: what is claimed.
        module: the network.
        inputs: one input tensor or the tuple of all positional arguments; floating tensors are cast to
            float64.
        draws: how many networks and elements to try.
        seed: seed of everything that is drawn.

    Raises:
        SpecError: the spec names a tensor that the module lacks, or of another shape.
    """
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(module).double().eval()
    arguments = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in (inputs if isinstance(inputs, tuple) else (inputs,))
    )
    state = {name: t for name, t in network.state_dict().items() if name in spec.tensors}
    missing = [name for name in spec.tensors if name not in state]
    if missing:
        raise SpecError(f"spec: the module has no tensor {missing[0]!r}")
    by_symmetry: dict[str, float] = {}
    worst = illegal = 0.0
    for _ in range(draws):
        weights = _randomised(state, generator)
        reference = _output(network, weights, arguments)
        for name, element in _single_symmetries(spec, generator):
            change = _change(reference, _output(network, act(spec, element, weights), arguments))
            by_symmetry[name] = max(by_symmetry.get(name, 0.0), change)
        element = random_element(spec, generator=generator)
        worst = max(worst, _change(reference, _output(network, act(spec, element, weights), arguments)))
        broken = _broken(spec, weights, generator)
        illegal = max(illegal, _change(reference, _output(network, broken, arguments)))
    return VerifyReport(max([worst, *by_symmetry.values()]), by_symmetry, illegal)


def _randomised(state: Weights, generator: torch.Generator) -> Weights:
    """Random values at each tensor's own scale, positive where all were (variances)."""
    drawn = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            drawn[name] = tensor.clone()
            continue
        scale = tensor.abs().mean().item() or 0.1
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
        drawn[name] = noise.abs() + 0.1 * scale if bool((tensor > 0).all()) else noise
    return drawn


def _output(network: nn.Module, weights: Weights, arguments: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        result = torch.func.functional_call(network, weights, arguments)
    if not isinstance(result, Tensor):
        raise SpecError(f"module: expected a tensor as output, found {type(result).__name__}")
    return result


def output_change(
    module: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], inputs: Tensor
) -> float:
    """Largest change of the output between two sets of weights, relative to the largest absolute output.

    In float64, so that what is left is the rounding of the weights themselves.
    """
    network = copy.deepcopy(module).double().eval()
    outputs = [
        _output(network, {name: tensor.double() for name, tensor in weights.items()}, (inputs.double(),))
        for weights in (before, after)
    ]
    return _change(*outputs)


def _change(reference: Tensor, output: Tensor) -> float:
    scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return ((output - reference).abs().max() / scale).item()


def _single_symmetries(spec: WeightSpec, generator: torch.Generator) -> Iterator[tuple[str, Element]]:
    element = random_element(spec, generator=generator)
    for name in spec.groups:
        yield f"permutation({name})", {name: element[name]}
    for name in spec.scalings:
        yield name, {name: element[name]}


def _broken(spec: WeightSpec, weights: Weights, generator: torch.Generator) -> Weights:
    """Reverse the units of one axis of one tensor alone."""
    movable = [
        (name, dim.axis)
        for name, tensor in spec.tensors.items()
        for cell in tensor.cells
        for dim in cell.dims
        if dim.group is not None and dim.size > 1
    ]
    if not movable:
        return weights
    name, axis = movable[int(torch.randint(len(movable), (1,), generator=generator))]
    return {**weights, name: weights[name].flip(axis)}
