"""Arrays of one's own in NumPy's files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from pydantic import Field

from weightspace.datagen.sources._source import SOURCES, Count, Signals, SourceConfig
from weightspace.errors import DataError

_SPLITS = 3


@SOURCES.register("arrays")
class Arrays(SourceConfig):
    """Items and labels in NumPy's files: one ``.npz`` with both, or a ``.npy`` of each."""

    items: str = Field(
        ...,
        description="file in the data root: .npy, or .npz with the array items and maybe labels and split",
    )
    labels: str | None = Field(
        None, description="file of the labels, .npy; null for those in the .npz, if any"
    )
    channels: bool = Field(
        False, description="the last axis holds channels or a table's features, and is no axis of the grid"
    )
    count: Count = None

    def load(self, data_root: Path | None) -> Signals:
        """Read the arrays; floats of other widths become float32, integers of other widths int64.

        Raises:
            DataError: a file is missing or damaged, or the arrays do not belong together.
        """
        if data_root is None:
            raise DataError(f"source arrays: pass --data-root DIR with the file {self.items}")
        path = data_root / self.items
        found = _read(path)
        if "items" not in found:
            raise DataError(f"{path}: expected an array items, found {', '.join(found) or 'none'}")
        labels_path = path if self.labels is None else data_root / self.labels
        labels = found.get("labels") if self.labels is None else _only(labels_path)
        items = _items(path, found["items"], self.channels)
        return Signals(
            items=items,
            labels=_labels(labels_path, labels, len(items)),
            official=_official(path, found.get("split"), len(items)),
            channels=items.shape[-1] if self.channels else None,
        ).subset(self.count, "source arrays")


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; the only one of a ``.npy`` is called ``items``."""
    if not path.is_file():
        raise DataError(f"source arrays: {path} not found; expected the file in --data-root")
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{path}: expected a file .npy or .npz, found {path.suffix or 'no suffix'}")
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return {"items": content}
            return {name: content[name] for name in content.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        problem = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read, it may be truncated ({problem})") from None


def _only(path: Path) -> np.ndarray:
    arrays = _read(path)
    if path.suffix == ".npz":
        raise DataError(f"{path}: expected the labels in a file .npy, or in the .npz of the items")
    return arrays["items"]


def _items(path: Path, items: np.ndarray, channels: bool) -> np.ndarray:
    if items.ndim < 2 or items.size == 0:
        raise DataError(f"{path}: items: expected (items, ...), found shape {list(items.shape)}")
    if items.dtype == np.uint8:
        return items
    if items.dtype.kind != "f":
        raise DataError(f"{path}: items: expected bytes (uint8) or floats, found {items.dtype}")
    bad = np.flatnonzero(~np.isfinite(items).reshape(len(items), -1).all(axis=1))
    if len(bad):
        raise DataError(f"{path}: item {bad[0]}: expected finite numbers")
    return items.astype(np.float32)


def _labels(path: Path, labels: np.ndarray | None, count: int) -> np.ndarray:
    """Classes as int64, targets as float32; (items, 0) for none."""
    if labels is None:
        return np.empty((count, 0), np.int64)
    if labels.shape != (count,):
        raise DataError(
            f"{path}: labels: expected one for each of {count} items, found shape {list(labels.shape)}"
        )
    if labels.dtype.kind not in "iuf":
        raise DataError(f"{path}: labels: expected integers or floats, found {labels.dtype}")
    wrong = np.flatnonzero(~np.isfinite(labels) if labels.dtype.kind == "f" else labels < 0)
    if len(wrong):
        expected = "a finite number" if labels.dtype.kind == "f" else "a class from 0"
        raise DataError(f"{path}: label of item {wrong[0]}: expected {expected}, found {labels[wrong[0]]}")
    return labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)


def _official(path: Path, split: np.ndarray | None, count: int) -> np.ndarray | None:
    if split is None:
        return None
    if split.shape != (count,) or split.dtype.kind not in "iu":
        raise DataError(
            f"{path}: split: expected one integer for each of {count} items, found {split.dtype} of shape "
            f"{list(split.shape)}"
        )
    wrong = np.flatnonzero((split < 0) | (split >= _SPLITS))
    if len(wrong):
        raise DataError(
            f"{path}: split of item {wrong[0]}: expected 0 (train), 1 (val) or 2 (test), found {split[wrong[0]]}"
        )
    return split.astype(np.uint8)
