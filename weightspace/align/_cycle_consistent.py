"""C2M3: all networks at once into one common order, by Frank-Wolfe, so that maps along every cycle close."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import Polynomial
from pydantic import Field
from torch import Tensor

from weightspace.align._merge_many import Descent, descend
from weightspace.align._registry import matcher
from weightspace.align._report import MatchReport, Stopwatch
from weightspace.align._soft import Matrices, act_soft, matrices_of, round_matrices
from weightspace.align._together import check_together, finish_together, joined, parameters_of
from weightspace.spec import Element, Weights, WeightSpec

# The share of the barycentre in what a climb starts from. On digit classifiers 0.9 ended higher than 0.5 or 0.1, which
# mostly fall back to where they came from; at 1 the gradient prefers no permutation.
_BLUR = 0.9


@matcher("c2m3", paper="arXiv:2405.17897", together=True)
def cycle_consistent(
    spec: WeightSpec,
    networks: Sequence[Mapping[str, Tensor]],
    *,
    restarts: Annotated[int, Field(ge=1)] = 1,
    max_steps: Annotated[int, Field(ge=1)] = 100,
    tolerance: Annotated[float, Field(ge=0)] = 1e-4,
    seed: int = 0,
) -> tuple[list[Weights], MatchReport]:
    r"""Bring many networks into one common order of units, the universe, from which maps between any two follow.

    Maximises the inner products of all pairs of networks, over one permutation per network and group,

        \sum_{a \ne b} < P_a . W_a, P_b . W_b >  =  || \sum_a P_a . W_a ||^2 - const,

    so that the map from network a to network b, ``P_b^-1 P_a``, composes to the identity around every cycle: matched pair
    by pair, networks do not have that. The permutations are relaxed to doubly stochastic matrices, all of which
    Frank-Wolfe moves at once: the linear step is an assignment per network and group, the length of the step the exact
    maximum of a polynomial. The matrices are rounded by assignment, and rounds of :func:`merge_many`, which has the same
    objective, go from there to where no single network can be brought closer to the others.

    A climb starts from what :func:`merge_many` finds, mixed with the barycentre of all permutations; it is kept if it
    ends higher. Groups in which others are nested (attention heads) are held in the climb and matched in the rounds
    after it.

    Args:
        spec: the weight space.
        networks: two or more, without batch axes.
        restarts: climbs. The first starts as above, the others from random permutations in place of those found.
        max_steps: upper limit of steps per climb.
        tolerance: a climb ends when the linear step promises less than this share of the objective.
        seed: of orders and random starts.

    Returns:
        The networks in their order, all in the order of the universe, and a report with an entry per network; its
        sweeps are steps and rounds.

    Raises:
        SpecError: networks that do not fit the spec or are not finite.
        ConfigError: fewer than two networks, or an option out of range.

    Reference:
        Crisostomi et al. 2024, "C2M3: Cycle-Consistent Multi-Model Merging", arXiv:2405.17897, algorithm 1. The start
        and the rounds after rounding are additions.

    Example:
        >>> spec = WeightSpec.mlp([2, 16, 1], activation="tanh")
        >>> a = spec.unflatten(torch.randn(spec.num_parameters))
        >>> elements = [spec.random_element(symmetries=["permutation"]) for _ in range(3)]
        >>> (first, *_), report = cycle_consistent(spec, [spec.act(element, a) for element in elements])
        >>> bool((report.distance_after < 1e-5).all())
        True
    """
    stopwatch = Stopwatch()
    check_together(spec, networks, seed=seed, tolerance=tolerance, restarts=restarts, max_steps=max_steps)
    with torch.inference_mode(False), torch.no_grad():  # gradients are taken with respect to matrices alone
        parameters = [parameters_of(spec, network) for network in networks]
        best, sweeps = _search(spec, parameters, restarts, max_steps, tolerance, seed)
    element = joined(spec, best.elements)
    return finish_together(spec, "c2m3", networks, element, sweeps, stopwatch)


def _search(
    spec: WeightSpec, networks: Sequence[Weights], restarts: int, max_steps: int, tolerance: float, seed: int
) -> tuple[Descent, int]:
    """The best of what merge-many and the climbs find, and the steps and rounds of that."""
    best = descend(spec, networks, seed=seed)
    sweeps = len(best.totals) - 1
    groups = _free_groups(spec)
    for restart in range(restarts if groups else 0):
        run = best.copy(np.random.default_rng([seed, restart, 1]))
        if restart > 0:
            run.scatter()
        climb = Climb(spec, stacked(run.moved), groups)
        matrices, steps = climb.run(climb.start(), max_steps, tolerance)
        for row, element in enumerate(separated(round_matrices(spec, matrices))):
            run.move(row, element)
        run.finish()
        if run.totals[-1] < best.totals[-1]:
            best, sweeps = run, steps + len(run.totals) - 1
    return best, sweeps


def _free_groups(spec: WeightSpec) -> tuple[str, ...]:
    """The groups that parameters know and that neither are nested nor have others nested in them."""
    tensors = (tensor for tensor in spec.tensors.values() if tensor.kind == "parameter")
    known = {dim.group for tensor in tensors for cell in tensor.cells for dim in cell.dims}
    outer = {name for group in spec.groups.values() for name in group.within}
    return tuple(
        name
        for name, group in spec.groups.items()
        if name in known and name not in outer and not group.within
    )


# -- Frank-Wolfe -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Climb:
    """Frank-Wolfe on the sum over pairs of networks of their inner products, under soft permutations.

    Args:
        spec: the weight space.
        networks: the parameters of all networks, ``(networks, ...)``.
        groups: that are permuted softly; the others are held.
    """

    spec: WeightSpec
    networks: Weights
    groups: tuple[str, ...]

    @property
    def degree(self) -> int:
        """The largest number of dims over these groups in a cell: weights are polynomials of it along a line."""
        cells = (cell for name in self.networks for cell in self.spec.tensors[name].cells)
        return max(sum(dim.group in self.groups for dim in cell.dims) for cell in cells)

    def start(self) -> Matrices:
        """Mostly the barycentre of all permutations, and some of the order that is."""
        like = next(iter(self.networks.values()))
        sizes = {name: self.spec.groups[name].size for name in self.groups}
        eyes = {name: torch.eye(size, dtype=like.dtype, device=like.device) for name, size in sizes.items()}
        blurred = {name: (1 - _BLUR) * eye + _BLUR / sizes[name] for name, eye in eyes.items()}
        return {name: matrix.repeat(len(like), 1, 1) for name, matrix in blurred.items()}

    def run(self, matrices: Matrices, max_steps: int, tolerance: float) -> tuple[Matrices, int]:
        """Steps until the linear one promises less than a share of the objective; how many there were."""
        for step in range(max_steps):
            moved, value, gradient = self._slope(matrices)
            element = round_matrices(self.spec, gradient)
            target = {
                name: matrix.to(gradient[name]) for name, matrix in matrices_of(self.spec, element).items()
            }
            promise = sum(
                ((target[name] - matrices[name]) * gradient[name]).sum(dtype=torch.float64).item()
                for name in matrices
            )
            length = (
                self._length(matrices, target, moved, element) if promise > tolerance * abs(value) else 0.0
            )
            if length == 0.0:
                return matrices, step
            matrices = _between(matrices, target, length)
        return matrices, max_steps

    def _slope(self, matrices: Matrices) -> tuple[Weights, float, Matrices]:
        """The moved weights, the objective, and its gradient."""
        with torch.enable_grad():
            leaves = {name: matrix.detach().requires_grad_() for name, matrix in matrices.items()}
            moved = act_soft(self.spec, leaves, self.networks)
            value = pairs(moved, moved)
            gradient = torch.autograd.grad(value, list(leaves.values()))
        found = {name: tensor.detach() for name, tensor in moved.items()}
        return found, value.item(), dict(zip(leaves, gradient, strict=True))

    def _length(self, matrices: Matrices, target: Matrices, moved: Weights, element: Element) -> float:
        """Where on the line to the target, from 0 to 1, the objective is highest.

        It is a polynomial of twice the degree: bilinear in the weights, of which ``degree + 1`` along the line say all.
        """
        nodes = np.linspace(0.0, 1.0, self.degree + 1)
        inner = [
            act_soft(self.spec, _between(matrices, target, float(t)), self.networks) for t in nodes[1:-1]
        ]
        # the ends need no product of matrices
        on_line = [moved, *inner, self.spec.act(element, self.networks)]
        bases = [_lagrange(nodes, at) for at in range(len(nodes))]
        objective = Polynomial([0.0])
        for i, first in enumerate(on_line):
            for j, second in enumerate(on_line[: i + 1]):
                objective += bases[i] * bases[j] * (pairs(first, second).item() * (1 if i == j else 2))
        return _highest(objective)


def pairs(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """The sum over ordered pairs of different networks of the first's inner product with the second's, float64."""
    sums = [
        (x.sum(0) * second[name].sum(0)).sum(dtype=torch.float64)
        - (x * second[name]).sum(dtype=torch.float64)
        for name, x in first.items()
    ]
    return torch.stack(sums).sum()


def stacked(networks: Sequence[Mapping[str, Tensor]]) -> Weights:
    """Networks along a leading axis."""
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def separated(element: Element) -> list[Element]:
    """An element per network, from one with a leading axis of networks."""
    rows = len(next(iter(element.values())))
    return [{name: value[row] for name, value in element.items()} for row in range(rows)]


def _between(matrices: Matrices, target: Matrices, t: float) -> Matrices:
    return {name: torch.lerp(matrix, target[name], t) for name, matrix in matrices.items()}


def _lagrange(nodes: np.ndarray, at: int) -> Polynomial:
    """The polynomial that is 1 at one node and 0 at the others."""
    basis = Polynomial.fromroots(np.delete(nodes, at))
    return basis / basis(nodes[at])


def _highest(objective: Polynomial) -> float:
    """Where on [0, 1] a polynomial is highest; the first of equals."""
    roots = np.atleast_1d(objective.deriv().roots())
    inside = roots.real[(abs(roots.imag) < 1e-9) & (roots.real > 0) & (roots.real < 1)]
    candidates = np.concatenate([[0.0], np.sort(inside), [1.0]])
    return float(candidates[objective(candidates).argmax()])
