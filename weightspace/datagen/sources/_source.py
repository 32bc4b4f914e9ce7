"""What every data source returns, and the registry of sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from weightspace.configuration import Registry


@dataclass(frozen=True)
class Signals:
    """Items of a data set, as signals on a regular grid.

    Args:
        items: (items, *grid) uint8; a network represents ``items / 255``.
        labels: (items,) int64 class of each item.
        official: (items,) uint8 split that the data set came with (0 train, 2 test), or None.
    """

    items: np.ndarray
    labels: np.ndarray
    official: np.ndarray | None = None


class SourceConfig(BaseModel):
    """Base of the configuration of a source: its fields are the keys under ``source:`` in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str]

    def load(self, data_root: Path | None) -> Signals:
        """Read the whole data set; ``data_root`` is where the user keeps files."""
        raise AssertionError(f"{type(self).__name__} does not load")


SOURCES: Registry[type[SourceConfig]] = Registry("source", "kind")
"""The sources that a recipe's ``source: {kind: ...}`` names; ``@SOURCES.register("kind")`` adds one."""
