"""What every data source returns, and the registry of sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field

from weightspace.configuration import Registry
from weightspace.errors import DataError

Count = Annotated[
    int | None, Field(ge=1, description="items to keep, a random subset; null for the whole data set")
]
"""The option of a source that is cut down by :meth:`Signals.subset`."""


@dataclass(frozen=True)
class Signals:
    """Items of a data set: signals on a regular grid, rows of a table, or sequences of tokens.

    | items | shape | dtype | channels | vocabulary |
    | --- | --- | --- | --- | --- |
    | grey images | (items, height, width) | uint8 or float32 | None | None |
    | RGB images | (items, height, width, 3) | uint8 or float32 | 3 | None |
    | sampled functions | (items, samples) | float32 | None | None |
    | rows of a table | (items, features) | float32 | features | None |
    | tokens | (items, length) | int64 | None | kinds of tokens |

    Args:
        items: (items, *grid) or, with channels, (items, *grid, channels); bytes stand for ``items / 255``, floats for
            themselves, and tokens are in [0, vocabulary).
        labels: (items,) int64 class from 0 or float32 target of each item; (items, 0) where there is none.
        official: (items,) uint8 split that the data set came with (0 train, 1 val, 2 test), or None.
        channels: size of the last axis where it is no axis of the grid, else None.
        vocabulary: number of kinds of tokens, for tokens.
        attributes: further labels by name, (items,) int64 or float32 each.
        class_names: of the classes in their order, where known.

    Raises:
        DataError: the arrays do not belong together, or are of other types.
    """

    items: np.ndarray
    labels: np.ndarray
    official: np.ndarray | None = None
    channels: int | None = None
    vocabulary: int | None = None
    attributes: Mapping[str, np.ndarray] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_items(self)
        _check_labels(self)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the grid without the channels; () for the rows of a table."""
        shape = self.items.shape[1:]
        return shape if self.channels is None else shape[:-1]

    @property
    def classes(self) -> int | None:
        """Number of classes; None where the label is a target or missing."""
        if self.labels.ndim != 1 or self.labels.dtype.kind == "f":
            return None
        return len(self.class_names) or int(self.labels.max()) + 1

    @property
    def named_labels(self) -> dict[str, np.ndarray]:
        """All labels by name: the class or target as ``label``, where there is one, and the attributes."""
        return {**({"label": self.labels} if self.labels.ndim == 1 else {}), **self.attributes}

    def values(self, rows: np.ndarray) -> Float[np.ndarray, "rows *grid"]:
        """What networks see of some items, float32: bytes in [0, 1], floats as they are.

        Raises:
            DataError: the items are tokens, which have no values.
        """
        if self.vocabulary is not None:
            raise DataError("signals: tokens have no values; a network embeds them")
        block = self.items[rows].astype(np.float32)
        return block / np.float32(255.0) if self.items.dtype == np.uint8 else block

    def take(self, rows: np.ndarray) -> Signals:
        """Some of the items with all that belongs to them."""
        return replace(
            self,
            items=self.items[rows],
            labels=self.labels[rows],
            official=None if self.official is None else self.official[rows],
            attributes={name: values[rows] for name, values in self.attributes.items()},
        )

    def subset(self, count: int | None, place: str) -> Signals:
        """A random part of the data set in its own order; the same one whenever the count is the same.

        Raises:
            DataError: there are fewer items; the message begins with ``place``.
        """
        return self if count is None else self.take(subset_rows(len(self), count, place))


def subset_rows(available: int, count: int, place: str) -> np.ndarray:
    """Which items a source with the option ``count`` keeps, sorted; a smaller count keeps some of them.

    Raises:
        DataError: there are fewer items; the message begins with ``place``.
    """
    if count > available:
        raise DataError(f"{place}: count: the data set has {available} items, found {count}")
    return np.sort(np.random.default_rng([0, available]).permutation(available)[:count])


def _check_items(signals: Signals) -> None:
    items, channels, vocabulary = signals.items, signals.channels, signals.vocabulary
    if items.ndim < 2 or items.size == 0:
        raise DataError(f"signals: expected items (items, ...), found shape {list(items.shape)}")
    if channels is not None and items.shape[-1] != channels:
        raise DataError(f"signals: expected {channels} channels on the last axis, found {items.shape[-1]}")
    if vocabulary is None:
        if items.dtype not in (np.uint8, np.float32):
            raise DataError(f"signals: expected items of uint8 or float32, found {items.dtype}")
    elif items.dtype != np.int64 or items.min() < 0 or items.max() >= vocabulary:
        raise DataError(
            f"signals: expected tokens of int64 from 0 to {vocabulary - 1}, found {items.dtype} from "
            f"{items.min()} to {items.max()}"
        )


def _check_labels(signals: Signals) -> None:
    labels, count = signals.labels, len(signals.items)
    official = {} if signals.official is None else {"official": signals.official}
    for name, values in {"labels": labels, **official, **signals.attributes}.items():
        if values.shape != (count,) and not (name == "labels" and values.shape == (count, 0)):
            raise DataError(
                f"signals: expected {name} of shape ({count},), as many as items, found {values.shape}"
            )
    for name, values in signals.named_labels.items():
        if values.dtype not in (np.int64, np.float32):
            raise DataError(f"signals: expected {name} of int64 or float32, found {values.dtype}")
        if values.dtype == np.float32 and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"signals: {name} of item {row}: expected a finite number, found {values[row]}")
    if signals.classes is None:
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= signals.classes))
    if len(wrong):
        expected = f"a class from 0 to {signals.classes - 1}" if signals.class_names else "a class from 0"
        raise DataError(
            f"signals: label of item {wrong[0]}: expected {expected}, found {int(labels[wrong[0]])}"
        )


class SourceConfig(BaseModel):
    """Base of the configuration of a source: its fields are the keys under ``source:`` in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: ClassVar[str]

    def load(self, data_root: Path | None) -> Signals:
        """Read the whole data set; ``data_root`` is where the user keeps files."""
        raise AssertionError(f"{type(self).__name__} does not load")


SOURCES: Registry[type[SourceConfig]] = Registry("source", "kind")
"""The sources that a recipe's ``source: {kind: ...}`` names; ``@SOURCES.register("kind")`` adds one."""


def data_folder(folder: str, data_root: Path | None, wanted: str) -> Path:
    """The folder of a data set of several files: a sub-folder of the data root, or the root itself.

    Args:
        folder: name of the sub-folder.
        data_root: where the user keeps files.
        wanted: the files, for the message.

    Raises:
        DataError: no data root.
    """
    if data_root is None:
        raise DataError(f"source {folder}: pass --data-root DIR with {wanted} in DIR/{folder}")
    # one folder for all files, so that no two data sets are mixed
    inner = data_root / folder
    return inner if inner.is_dir() else data_root
