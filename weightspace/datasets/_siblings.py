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
    """Members in the order of their items, and of their networks within.

    Args:
        order: (members,) their positions.
        item: (members, 2) where in ``order`` the members of the same item begin and end.
        network: (members, 2) likewise those of the same network, of which there are several checkpoints in some zoos.
    """

    order: np.ndarray
    item: np.ndarray
    network: np.ndarray

    @classmethod
    def among(cls, items: np.ndarray, networks: np.ndarray) -> Siblings | None:
        """Of members with the given items and networks, (members,); None when no item has two networks."""
        order = np.lexsort((networks, items))
        item, network = (_blocks(values, order) for values in (items, networks))
        return None if np.array_equal(item, network) else cls(order, item, network)

    def other(self, positions: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """A member that is another network of the same item, by numbers in [0, 1); itself where there is none."""
        (start, stop), (first, last) = self.item[positions].T, self.network[positions].T
        count = stop - start - (last - first)
        place = start + (uniform * count).astype(np.int64)
        place += np.where(place >= first, last - first, 0)  # over the network itself
        return np.where(count > 0, self.order[np.minimum(place, len(self.order) - 1)], positions)

    def of(
        self, read: Callable[[np.ndarray], Tensor], spec: WeightSpec, positions: np.ndarray
    ) -> Callable[[Draws], Weights]:
        """What reads another view of each of some members, given draws."""

        def others(draws: Draws) -> Weights:
            return spec.unflatten(read(self.other(positions, draws.uniform().double().cpu().numpy())))

        return others


def _blocks(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For every member, where in an order that puts equal values together those like its own begin and end."""
    sorted_values = values[order]
    starts = np.flatnonzero(np.r_[True, sorted_values[1:] != sorted_values[:-1]])
    stops = np.r_[starts[1:], len(values)]
    block = np.searchsorted(starts, np.arange(len(values)), side="right") - 1
    found = np.empty((len(values), 2), np.int64)
    found[order] = np.stack([starts[block], stops[block]], 1)
    return found
