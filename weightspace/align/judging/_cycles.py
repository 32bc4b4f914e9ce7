"""Whether maps between networks close: from a to b to c and back to a, is every unit where it was?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import permutations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._data import Batches, Loss
from weightspace.align._registry import align_networks, find_matcher
from weightspace.align._report import compare
from weightspace.errors import ConfigError
from weightspace.spec import Element, WeightSpec, source_index
from weightspace.spec._cells import unit_cell


@dataclass(frozen=True, eq=False)
class CycleReport:
    """How far a matcher's maps between networks are from closing, with one entry per cycle.

    Args:
        method: name of the matcher.
        cycles: the networks that each goes through, in order; it ends where it began.
        moved: share of all units that are not back at their place, in [0, 1].
        distance: L2 distance of the network to what came back, over its norm; parameters alone count.
        seconds: wall time of matching.
    """

    method: str
    cycles: tuple[tuple[int, ...], ...]
    moved: Float[Tensor, " cycles"]
    distance: Float[Tensor, " cycles"]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Means over the cycles, and everything about each."""
        each = zip(self.cycles, self.moved.tolist(), self.distance.tolist(), strict=True)
        return {
            "method": self.method,
            "moved": self.moved.mean().item(),
            "distance": self.distance.mean().item(),
            "seconds": self.seconds,
            "cycles": [{"through": list(cycle), "moved": m, "distance": d} for cycle, m, d in each],
        }

    def to_json(self) -> str:
        """Means over the cycles, and everything about each."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def summary(self) -> str:
        """One line: means over the cycles."""
        return (
            f"{self.method}: over {len(self.cycles)} cycles of {len(self.cycles[0])} networks "
            f"{100 * self.moved.mean().item():.2f} % of units do not come back, "
            f"relative L2 distance {self.distance.mean().item():.4g}"
        )

    def __str__(self) -> str:
        return self.summary()


def cycle_error(
    spec: WeightSpec,
    networks: Sequence[Mapping[str, Tensor]],
    method: str = "weight-matching",
    *,
    length: int = 3,
    module: nn.Module | None = None,
    data: Batches | None = None,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    **options: Any,
) -> CycleReport:
    """Map each network to the next along every cycle of different networks, and see what does not come back.

    With ``g_ab`` the element by which the matcher brings network a onto network b, the cycle a -> b -> c -> a is the
    element ``g_ca g_bc g_ab``. Matchers of pairs choose each map by itself, so that cycles need not close. The
    matchers that move all networks together into one order have ``g_ab = g_b^-1 g_a``, and all cycles close.

    Args:
        spec: the weight space.
        networks: two or more, without batch axes.
        method: name of a matcher, one of ``MATCHERS``.
        length: how many networks a cycle goes through, at least 2; all ordered choices of so many are taken.
        module: that computes the networks' function, for matchers that run them.
        data: batches of inputs and targets, for matchers that need them.
        loss: of outputs and targets, for matchers that train.
        seed: of the search.
        options: of the matcher.

    Raises:
        ConfigError: fewer than two networks, cycles that are longer than there are networks, or what
            :func:`align_networks` refuses.
        SpecError: networks that do not fit the spec.

    Reference:
        Crisostomi et al. 2024, "C2M3: Cycle-Consistent Multi-Model Merging", arXiv:2405.17897, section 3, who define
        cycle consistency.

    Example:
        >>> spec = WeightSpec.mlp([2, 16, 16, 1])
        >>> networks = [spec.unflatten(torch.randn(spec.num_parameters)) for _ in range(3)]
        >>> cycle_error(spec, networks, "c2m3").moved.tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if len(networks) < 2:
        raise ConfigError(f"networks: expected at least two, found {len(networks)}")
    if not 2 <= length <= len(networks):
        raise ConfigError(f"length: expected 2 to {len(networks)} networks in a cycle, found {length}")
    given = {"module": module, "data": data, "loss": loss, "seed": seed, **options}
    maps, seconds = (_through_universe if find_matcher(method).together else _pair_by_pair)(
        spec, networks, method, given
    )
    cycles = tuple(permutations(range(len(networks)), length))
    found = []
    for cycle in cycles:
        steps = [maps[a, b] for a, b in zip(cycle, (*cycle[1:], cycle[0]), strict=True)]
        whole = reduce(lambda first, second: spec.compose(second, first), steps)
        found.append((_moved(spec, whole), _distance(spec, whole, networks[cycle[0]])))
    moved, distance = (torch.tensor(values, dtype=torch.float64) for values in zip(*found, strict=True))
    return CycleReport(method, cycles, moved, distance, seconds)


_Maps = dict[tuple[int, int], Element]


def _pair_by_pair(
    spec: WeightSpec, networks: Sequence[Mapping[str, Tensor]], method: str, given: Mapping[str, Any]
) -> tuple[_Maps, float]:
    """For every ordered pair (a, b) the element that brings a onto b, and the time that it took."""
    maps: _Maps = {}
    seconds = 0.0
    for b, reference in enumerate(networks):
        others = [a for a in range(len(networks)) if a != b]
        _, report = align_networks(spec, [reference, *(networks[a] for a in others)], method, **given)
        seconds += report.seconds
        for row, a in enumerate(others, start=1):
            maps[a, b] = {name: value[row] for name, value in report.element.items()}
    return maps, seconds


def _through_universe(
    spec: WeightSpec, networks: Sequence[Mapping[str, Tensor]], method: str, given: Mapping[str, Any]
) -> tuple[_Maps, float]:
    """The same of a matcher that brings all networks into one order."""
    _, report = align_networks(spec, networks, method, **given)
    rows = range(len(networks))
    to = [{name: value[row] for name, value in report.element.items()} for row in rows]
    back = [spec.invert(element) for element in to]
    return {(a, b): spec.compose(back[b], to[a]) for a in rows for b in rows if a != b}, report.seconds


def _moved(spec: WeightSpec, element: Element) -> float:
    """The share of all units that are not at their place."""
    moved = units = 0
    for name in spec.groups:
        cell = unit_cell(spec, name)
        source = source_index(cell, element)
        units += cell.numel
        if source is not None:
            stay = torch.arange(cell.numel, device=source.device).view(cell.sizes)
            moved += int((source != stay).sum())
    return moved / units if units else 0.0


def _distance(spec: WeightSpec, element: Element, network: Mapping[str, Tensor]) -> float:
    nothing = {name: torch.zeros_like(tensor) for name, tensor in network.items()}
    with torch.no_grad():
        _, distance = compare(spec, network, spec.act(element, network))
        _, norm = compare(spec, nothing, network)
    return (distance / norm).item() if norm > 0 else 0.0
