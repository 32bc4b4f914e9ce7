"""Which members of a data set are views of the same item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from weightspace.datasets.augment import Draws
from weightspace.spec import Weights, WeightSpec


@dataclass(frozen=True)
class Siblings:
    """Members in the order of their items.

    Args:
        order: (members,) their positions, those of one item next to each other.
        rank: (members,) place of each member in ``order``.
        start: (members,) place of the first member of the same item.
        count: (members,) members of the same item.
    """

    order: np.ndarray
    rank: np.ndarray
    start: np.ndarray
    count: np.ndarray

    @classmethod
    def among(cls, items: np.ndarray) -> Siblings | None:
        """Of members with the given items, (members,); None when all items differ."""
        _, number, counts = np.unique(items, return_inverse=True, return_counts=True)
        if counts.max(initial=1) == 1:
            return None
        order = np.argsort(number, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return cls(order, rank, (np.cumsum(counts) - counts)[number], counts[number])

    def other(self, positions: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Another member of the same item for each, by numbers in [0, 1); itself where there is none."""
        start, count = self.start[positions], self.count[positions]
        step = 1 + (uniform * (count - 1)).astype(np.int64)
        return self.order[start + (self.rank[positions] - start + step) % count]

    def of(
        self, read: Callable[[np.ndarray], Tensor], spec: WeightSpec, positions: np.ndarray
    ) -> Callable[[Draws], Weights]:
        """What reads another view of each of some members, given draws."""

        def others(draws: Draws) -> Weights:
            return spec.unflatten(read(self.other(positions, draws.uniform().double().cpu().numpy())))

        return others
