"""Paths that files name: matched with those of the source, and never followed out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from weightspace.errors import DataError


class PathIndex:
    """Finds which of the source's paths another path means.

    Lists were often written on another machine: a path is matched by its trailing parts, whether it is absolute or
    relative.

    Args:
        paths: below the source.

    Example:
        >>> index = PathIndex(["zoo/a/net.pth", "zoo/b/net.pth"])
        >>> index.find("/home/ann/zoo/b/net.pth", "splits.json"), index.find("a/net.pth", "splits.json")
        (1, 0)
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._places = {path: place for place, path in enumerate(paths)}
        self._depths = sorted({path.count("/") + 1 for path in paths}, reverse=True)
        self._endings: dict[int, dict[str, list[int]]] = {}

    def find(self, path: str, where: str) -> int | None:
        """The place of the path that is meant; None if there is none.

        Args:
            path: as it stands in a list.
            where: the list, for messages.

        Raises:
            DataError: it leaves the source, or may be one of several.
        """
        parts = inner_parts(path, where)
        for depth in self._depths:
            place = self._places.get("/".join(parts[-depth:])) if depth <= len(parts) else None
            if place is not None:
                return place
        places = self._ending(len(parts)).get("/".join(parts), []) if parts else []
        if len(places) > 1:
            raise DataError(f"{where}: {path!r} may be one of {len(places)} files")
        return places[0] if places else None

    def _ending(self, depth: int) -> dict[str, list[int]]:
        """The places by the last so many parts of their paths."""
        if depth not in self._endings:
            found: dict[str, list[int]] = {}
            for path, place in self._places.items():
                found.setdefault("/".join(path.split("/")[-depth:]), []).append(place)
            self._endings[depth] = found
        return self._endings[depth]


def inner_parts(path: str, where: str) -> list[str]:
    """The parts of a path, without ``.`` and ``..``.

    Raises:
        DataError: it leads out of the folder that it begins in.

    Example:
        >>> inner_parts("a/./b/../c.pth", "splits.json")
        ['a', 'c.pth']
    """
    parts: list[str] = []
    for part in PurePosixPath(path.replace("\\", "/")).parts:
        if part == "..":
            if not parts:
                raise DataError(f"{where}: {path!r} leads out of the source folder")
            parts.pop()
        elif part not in (".", "/", "//"):
            parts.append(part)
    return parts
