"""Another network of the same item in place of each."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weightspace.datasets.augment._augmentation import AUGMENTATIONS, Augmentation, options
from weightspace.datasets.augment._batch import Batch
from weightspace.datasets.augment._draws import Draws
from weightspace.errors import ConfigError


@AUGMENTATIONS.register("views", changes_signal=True, effect="that of another network of the same item")
class Views(Augmentation):
    """Replace networks by another one that was fitted to the same item; it comes first in a composition.

    Args:
        p: probability that a network is replaced, in [0, 1].
    """

    comes_first = True

    @options
    def __init__(
        self,
        p: Annotated[float, Field(ge=0, le=1, description="probability that a network is replaced")] = 0.5,
    ) -> None:
        self.p = p

    def check(self, batch: Batch) -> None:
        """Other views are known."""
        if batch.siblings is None:
            raise ConfigError(
                "views: expected a zoo with several views of some items, found one network per item, or views with "
                "different targets"
            )

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """Read the others, and choose."""
        assert batch.siblings is not None
        replaced = draws.uniform() < self.p
        others = batch.siblings(draws)
        return batch.with_(
            weights={name: _chosen(replaced, others[name], w) for name, w in batch.weights.items()}
        )


def _chosen(replaced: Tensor, other: Tensor, own: Tensor) -> Tensor:
    return torch.where(replaced.view(-1, *[1] * (own.ndim - 1)), other, own)
