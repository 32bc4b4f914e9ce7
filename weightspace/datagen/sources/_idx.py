"""IDX files, the format of MNIST and its relatives, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from pydantic import Field

from weightspace.datagen.sources._source import SOURCES, Signals, SourceConfig, data_folder
from weightspace.errors import DataError

_PARTS = {"train": 0, "t10k": 2}  # prefix of the files -> split
_WANTED = ", ".join(f"{part}-{kind}-ubyte" for part in _PARTS for kind in ("images-idx3", "labels-idx1"))
_UNSIGNED_BYTE = 0x08


@SOURCES.register("idx")
class Idx(SourceConfig):
    """Images and labels in four IDX files: ``{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]``."""

    folder: str = Field(
        ..., description="sub-folder of the data root that holds the files (or the root itself)"
    )

    def load(self, data_root: Path | None) -> Signals:
        """Read training and test images, in this order.

        Raises:
            DataError: a file is missing, truncated or malformed.
        """
        folder = data_folder(self.folder, data_root, f"the files {_WANTED} (or .gz)")
        parts = {part: self._part(folder, part) for part in _PARTS}
        shapes = {images.shape[1:] for images, _ in parts.values()}
        if len(shapes) > 1:
            raise DataError(
                f"source {self.folder}: training and test images differ in size: {sorted(shapes)}"
            )
        return Signals(
            items=np.concatenate([images for images, _ in parts.values()]),
            labels=np.concatenate([labels for _, labels in parts.values()]).astype(np.int64),
            official=np.concatenate(
                [np.full(len(labels), _PARTS[part], np.uint8) for part, (_, labels) in parts.items()]
            ),
        )

    def _part(self, folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
        images_path = self._find(folder, f"{part}-images-idx3-ubyte")
        labels_path = self._find(folder, f"{part}-labels-idx1-ubyte")
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{images_path}: expected as many images as labels, found shapes "
                f"{list(images.shape)} and {list(labels.shape)}"
            )
        return images, labels

    def _find(self, folder: Path, name: str) -> Path:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
        raise DataError(
            f"source {self.folder}: {name} (or .gz) not found in {folder}; expected the files {_WANTED} in a "
            f"folder {self.folder} of --data-root, or in --data-root itself"
        )


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes.

    Layout (big-endian): two zero bytes, the type code 0x08, the number of dimensions, one 32-bit size per
    dimension, the data.

    Raises:
        DataError: the file is truncated, has bytes to spare, or holds another type.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, it may be truncated ({error})") from None
    if len(content) < 4 or content[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
        raise DataError(f"{path}: not an IDX file of unsigned bytes")
    ndim = content[3]
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"{path}: expected a header of {header} bytes, found {len(content)}")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(f"{path}: expected {expected} bytes for shape {list(shape)}, found {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
