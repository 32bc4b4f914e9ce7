"""CIFAR-10 in its binary version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from weightspace.datagen.sources._images import Grey, Size, grey_of, resized
from weightspace.datagen.sources._source import SOURCES, Count, Signals, SourceConfig, data_folder
from weightspace.errors import DataError

_SIDE = 32
_RECORD = 1 + 3 * _SIDE * _SIDE
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SPLITS = {**{f"data_batch_{number}.bin": 0 for number in range(1, 6)}, "test_batch.bin": 2}
_WANTED = f"the files {', '.join(_SPLITS)}"


@SOURCES.register("cifar10")
class Cifar10(SourceConfig):
    """CIFAR-10, RGB images of 32x32 pixels, in six files: ``data_batch_{1..5}.bin`` and ``test_batch.bin``."""

    folder: str = Field(
        "cifar-10-batches-bin",
        description="sub-folder of the data root that holds the files (or the root itself)",
    )
    grey: Grey = False
    size: Size = None
    count: Count = None

    def load(self, data_root: Path | None) -> Signals:
        """Read the five training files and the test file, in this order.

        Raises:
            DataError: a file is missing or truncated, or a label is none of the ten classes.
        """
        folder = data_folder(self.folder, data_root, _WANTED)
        missing = next((name for name in _SPLITS if not (folder / name).is_file()), None)
        if missing is not None:
            raise DataError(
                f"source {self.folder}: {missing} not found in {folder}; expected {_WANTED} in a folder {self.folder} of "
                "--data-root, or in --data-root itself"
            )
        parts = [_read(folder / name) for name in _SPLITS]
        _check_equal_lengths(folder, [len(labels) for _, labels in parts])
        signals = Signals(
            items=np.concatenate([self._pixels(images) for images, _ in parts]),
            labels=np.concatenate([labels for _, labels in parts]).astype(np.int64),
            official=np.repeat(np.array([*_SPLITS.values()], np.uint8), len(parts[0][1])),
            channels=None if self.grey else 3,
            class_names=_CLASSES,
        )
        return signals.subset(self.count, f"source {self.folder}")

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        return resized(grey_of(images) if self.grey else images, self.size)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (records, 32, 32, 3) and labels of one file: per record the label, then the red, green and blue planes."""
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) == 0 or len(content) % _RECORD:
        raise DataError(
            f"{path}: expected records of {_RECORD} bytes, found {len(content)} bytes; it may be truncated"
        )
    records = content.reshape(-1, _RECORD)
    labels = records[:, 0]
    wrong = np.flatnonzero(labels >= len(_CLASSES))
    if len(wrong):
        raise DataError(f"{path}: record {wrong[0]}: expected a label from 0 to 9, found {labels[wrong[0]]}")
    planes = records[:, 1:].reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(np.moveaxis(planes, 1, 3)), labels


def _check_equal_lengths(folder: Path, lengths: list[int]) -> None:
    """All six files hold as many records: one that was cut between two records is found too."""
    expected = max(lengths)
    for name, found in zip(_SPLITS, lengths, strict=True):
        if found != expected:
            raise DataError(
                f"{folder / name}: expected {expected} records, as in the other files, found {found}; it may be "
                "truncated"
            )
