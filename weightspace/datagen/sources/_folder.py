"""Folders of images: one sub-folder per class, or images without labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from weightspace.datagen.sources._images import Grey, Size, grey_of, resized
from weightspace.datagen.sources._source import SOURCES, Count, Signals, SourceConfig, subset_rows
from weightspace.errors import DataError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Listing:
    """The images of a folder in order, with their classes and splits where it has some."""

    paths: list[Path]
    labels: list[int] | None = None
    splits: list[int] | None = None
    class_names: tuple[str, ...] = ()


@SOURCES.register("folder")
class Folder(SourceConfig):
    """PNG and JPEG images: a sub-folder per class (also within ``train``, ``val`` and ``test``), or no labels."""

    folder: str = Field(..., description="folder of the images, relative to the data root")
    size: Size = None
    grey: Grey = False
    count: Count = None

    def load(self, data_root: Path | None) -> Signals:
        """Read the images in order of their classes' and their own names; transparency is dropped.

        Raises:
            DataError: there are no images, one cannot be read, they differ in size and no ``size`` is set, or a
                class has none in ``train``.
        """
        if data_root is None:
            raise DataError(
                f"source folder: pass --data-root DIR with a folder {self.folder} of PNG or JPEG files"
            )
        root = data_root / self.folder
        if not root.is_dir():
            raise DataError(
                f"source folder: {root} not found; expected a folder {self.folder} of --data-root"
            )
        try:
            found = _listing(root)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from None
        rows = np.arange(len(found.paths))
        if self.count is not None:  # before anything is decoded
            rows = subset_rows(len(rows), self.count, "source folder")
        return Signals(
            items=self._images([found.paths[row] for row in rows]),
            labels=_labels(found.labels, len(found.paths))[rows],
            official=None if found.splits is None else np.array(found.splits, np.uint8)[rows],
            channels=None if self.grey else 3,
            class_names=found.class_names,
        )

    def _images(self, paths: list[Path]) -> np.ndarray:
        images: list[np.ndarray] = []
        for path in paths:
            image = _read(path)
            image = resized((grey_of(image) if self.grey else image)[None], self.size)[0]
            if images and image.shape != images[0].shape:
                raise DataError(
                    f"{path}: expected {_pixels(images[0])} pixels, as {paths[0].name} has, found {_pixels(image)}; "
                    "set size to resize all"
                )
            images.append(image)
        return np.stack(images)


def _labels(labels: list[int] | None, count: int) -> np.ndarray:
    return np.empty((count, 0), np.int64) if labels is None else np.array(labels, np.int64)


def _pixels(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _listing(root: Path) -> _Listing:
    """All images below a folder.

    Raises:
        DataError: there are none, or both images and folders of images.
    """
    loose, folders = _images_in(root), _folders_in(root)
    if loose and folders:
        raise DataError(
            f"{root}: expected either images or one folder of images per class, found both ({loose[0].name} and "
            f"{folders[0].name})"
        )
    if folders:
        parts = [folder for folder in folders if folder.name in _SPLITS]
        return _split_listing(root, parts) if len(parts) == len(folders) else _class_listing(root, folders)
    if not loose:
        raise DataError(f"{root}: holds no PNG or JPEG files")
    return _Listing(loose)


def _class_listing(root: Path, folders: list[Path]) -> _Listing:
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = sorted(path for path in folder.rglob("*") if _is_image(path))
        if not images:
            raise DataError(f"{folder}: holds no PNG or JPEG files, expected images of one class of {root}")
        paths += images
        labels += [label] * len(images)
    return _Listing(paths, labels, class_names=tuple(folder.name for folder in folders))


def _split_listing(root: Path, parts: list[Path]) -> _Listing:
    """Folders named as splits, each of the same kind, whose classes are those of ``train``."""
    parts = sorted(parts, key=lambda part: _SPLITS.index(part.name))
    listings = [_listing(part) for part in parts]
    if parts[0].name != "train":
        raise DataError(f"{root}: expected a folder train beside {parts[0].name}, found none")
    names = listings[0].class_names
    for part, listing in zip(parts, listings, strict=True):
        if listing.class_names != names:
            raise DataError(
                f"{part}: expected the classes {', '.join(names) or '(none)'} of {parts[0]}, found "
                f"{', '.join(listing.class_names) or 'none'}"
            )
    labels = [label for listing in listings for label in listing.labels or ()]
    splits = [
        _SPLITS.index(part.name) for part, listing in zip(parts, listings, strict=True) for _ in listing.paths
    ]
    return _Listing(
        [path for listing in listings for path in listing.paths], labels if names else None, splits, names
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_image(path))


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read(path: Path) -> np.ndarray:
    """One image, (height, width, 3) uint8."""
    from matplotlib.image import imread

    try:
        pixels = np.asarray(imread(path))
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        problem = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({problem})") from None
    if pixels.dtype != np.uint8:  # matplotlib reads PNG as floats in [0, 1]
        pixels = np.rint(pixels * 255.0).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])
