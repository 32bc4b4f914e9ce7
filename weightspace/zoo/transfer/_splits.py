"""Splits files: which networks are for training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightspace.errors import DataError
from weightspace.zoo._zoo import SPLITS
from weightspace.zoo.transfer._listing import Listing, Problem
from weightspace.zoo.transfer._paths import PathIndex
from weightspace.zoo.transfer._tables import numbers, read_json

_SPELLINGS = {
    **{name: name for name in SPLITS},
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}


def read_splits(path: Path) -> dict[str, tuple[list[str], list[Any] | None]]:
    """The paths, and labels if there are any, of each split; splits that are none of ours are refused.

    ``{"train": {"path": [...], "label": [...]}, ...}`` or ``{"train": [...], ...}``.

    Raises:
        DataError: not such a file.
    """
    document = read_json(path)
    if not isinstance(document, Mapping) or not document:
        raise DataError(f"{path}: expected a JSON object of {', '.join(SPLITS)}")
    found: dict[str, tuple[list[str], list[Any] | None]] = {}
    for name, entry in document.items():
        split = split_name(name)
        if split is None:
            raise DataError(f"{path}: expected one of {', '.join(SPLITS)}, found {name!r}")
        if split in found:
            raise DataError(f"{path}: expected each split once, found {', '.join(document)}")
        paths, labels = (
            (entry.get("path"), entry.get("label")) if isinstance(entry, Mapping) else (entry, None)
        )
        if not isinstance(paths, list) or not all(isinstance(each, str) for each in paths):
            raise DataError(f"{path}: {name}: expected a list of paths, or an object with one under 'path'")
        if labels is not None and (not isinstance(labels, list) or len(labels) != len(paths)):
            raise DataError(f"{path}: {name}: expected {len(paths)} labels, one for each path")
        found[split] = paths, labels
    return found


def split_name(text: Any) -> str | None:
    """One of ``SPLITS``, however it is spelled; None for what is none.

    Example:
        >>> split_name("Testing")
        'test'
    """
    return _SPELLINGS.get(str(text).strip().lower())


def apply_splits(listing: Listing, path: Path) -> Listing:
    """The listing with the splits of a file, and its labels where the listing has none.

    Listed paths without a file, files that are not listed, and contradictions are added to the problems.

    Raises:
        DataError: not a splits file, or a path that leads out of the source, or lies in two splits.
    """
    names = listing.known_as or listing.paths
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    index, known = PathIndex(list(places)), list(places)
    split: list[str | None] = [None] * len(names)
    labels: list[Any] = [None] * len(names)
    problems = []
    for name, (paths, given) in read_splits(path).items():
        for at, listed in enumerate(paths):
            found = index.find(listed, str(path))
            if found is None:
                problems.append(Problem(listed, f"listed in {path.name}, but there is no such file"))
                continue
            for place in places[known[found]]:
                if split[place] not in (None, name):
                    raise DataError(f"{path}: {listed!r} is in {split[place]} and in {name}")
                split[place] = name
                labels[place] = None if given is None else given[at]
    problems += [
        Problem(listing.paths[place], f"not listed in {path.name}")
        for place, name in enumerate(split)
        if name is None
    ]
    problems += _contradictions(listing, labels, path)
    bad = {problem.name for problem in problems}
    kept = [place for place, name in enumerate(split) if name is not None and listing.paths[place] not in bad]
    own = dict(listing.labels)
    if "label" not in own and any(label is not None for label in labels):
        own["label"] = labels
    return replace(listing, split=split, labels=own, problems=listing.problems + problems).take(kept)


def _contradictions(listing: Listing, labels: list[Any], path: Path) -> list[Problem]:
    own = numbers(listing.labels.get("label", []))
    if own is None or not len(own):
        return []
    return [
        Problem(listing.paths[place], f"its label is {own[place]}, but {label} in {path.name}")
        for place, label in enumerate(labels)
        if label is not None and str(label) != str(own[place])
    ]
