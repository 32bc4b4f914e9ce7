"""Rows of a zoo that is being made, kept as they come: a killed process goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from weightspace.errors import OutputError
from weightspace.zoo._files import atomic_path, canonical_json, check_output, stored_digest
from weightspace.zoo._locks import hold_lock, own_name
from weightspace.zoo._zoo import Zoo

RECORD, LOG, LOCK = "work.json", "log.jsonl", "lock"


class RowStore:
    """The rows of one zoo to be, in ``OUT.h5.parts``: appended block by block, and at the end written as a zoo.

    The folder holds ``work.json``, the work that it belongs to; ``rows-NAME``, the rows of each
    population, one after the other; and ``log.jsonl`` with a line per block: how many rows of which population, the
    notes, and a checksum of both. A block without its line, or whose checksum does not hold, was cut off by a kill or
    a power cut: it is forgotten, with what came after it.

    Used as a context manager, it holds the lock of the folder.

    Args:
        output: the zoo to be.
        work: all that the rows depend on, as JSON: rows of other work are refused, with the first entry that differs.
        overwrite: replace an existing zoo, and throw away rows of other work.

    Attributes:
        done: rows that are there.
        notes: of all blocks that are there, one after the other.

    Raises:
        OutputError: the output exists, its folder is missing, ``OUT.h5.parts`` holds something else, or another process
            writes it.

    Example:
        >>> import tempfile
        >>> from weightspace.testing import tiny_zoo
        >>> from dataclasses import replace
        >>> zoo, folder = tiny_zoo(networks=4), Path(tempfile.mkdtemp())
        >>> work = {"command": "copy", "source": zoo.digest}
        >>> with RowStore(folder / "copy.h5", work) as store:
        ...     store.append({"inr": zoo["inr"].weights[:3]})
        >>> with RowStore(folder / "copy.h5", work) as store:
        ...     print(store.done)
        ...     store.append({"inr": zoo["inr"].weights[store.done :]})
        ...     digest = store.finish(lambda rows: Zoo({"inr": replace(zoo["inr"], weights=rows["inr"])}))
        3
        >>> digest == zoo.digest
        True
    """

    def __init__(self, output: Path, work: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.output, self.work, self.overwrite = output, work, overwrite
        self.path = output.with_name(f"{output.name}.parts")
        self.done = 0
        self.notes: list[Any] = []
        self._populations: dict[str, _Rows] = {}
        self._end = 0  # of what counts in the log
        self._stack = ExitStack()
        check_output(output, overwrite=overwrite)
        self._check()

    def __enter__(self) -> RowStore:
        with ExitStack() as stack:
            stack.enter_context(hold_lock(self.path / LOCK, own_name(), shared=False))
            check_output(self.output, overwrite=self.overwrite)  # who held the lock may have finished
            self._check()
            self._open()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def append(self, rows: np.ndarray | Mapping[str, np.ndarray], notes: Sequence[Any] = ()) -> None:
        """Keep a block: rows of one population (then called ``networks``), or of several by name.

        Args:
            rows: (n, P) each, of one type and one P per population throughout.
            notes: as JSON, of any number: what is to be known of the block when it is resumed, or finished.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        blocks = rows if isinstance(rows, Mapping) else {"networks": rows}
        blocks = {name: np.ascontiguousarray(block) for name, block in blocks.items() if len(block)}
        line = {
            "rows": [[name, *block.shape, block.dtype.str] for name, block in blocks.items()],
            "notes": list(notes),
            "checksum": _checksum(notes, blocks.values()),
        }
        written = f"{canonical_json(line)}\n".encode()
        with self._writing():
            for name, block in blocks.items():
                stored = self._populations.get(name) or self._new(name, block)
                assert (stored.parameters, stored.dtype) == (block.shape[1], block.dtype), (
                    "rows of another kind"
                )
                _write_at(stored.path, stored.size, block.data.cast("B"))
            _write_at(self.path / LOG, self._end, written)
        self._count(blocks, notes, len(written))

    def finish(self, make: Callable[[Mapping[str, np.ndarray]], Zoo]) -> str:
        """Write the zoo, atomically, and remove the folder; returns the zoo's digest.

        Args:
            make: the zoo from the rows of each population, (rows, P) each, mapped from the disk.

        Raises:
            OutputError: the zoo cannot be written; the rows are kept.
        """
        zoo = make({name: rows.mapped() for name, rows in self._populations.items()})
        zoo.save(self.output, overwrite=self.overwrite)
        self._empty()
        (self.path / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has just come to see whether there is anything to do
            self.path.rmdir()
        return stored_digest(self.output)

    # -- the folder ----------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise OutputError for a folder of something else."""
        if not self.path.exists():
            return
        if not (self.path / RECORD).exists():
            if not self.path.is_dir() or any(not _is_ours(entry) for entry in self.path.iterdir()):
                raise OutputError(
                    f"output: {self.path} is no folder of unfinished rows (it has no {RECORD}); move it away"
                )
        elif not self.overwrite and (difference := self._difference()) is not None:
            raise OutputError(
                f"output: {self.path} holds the beginning of other work ({difference}); "
                "choose another name or pass --overwrite"
            )

    def _difference(self) -> str | None:
        """The first entry in which the folder's work is another, in words."""
        try:
            old = json.loads((self.path / RECORD).read_bytes())
        except ValueError:
            old = None
        if not isinstance(old, dict):
            return f"its {RECORD} is damaged"
        new = json.loads(json.dumps(self.work))  # in the order in which it was written
        key = next((key for key in [*new, *old] if old.get(key) != new.get(key)), None)
        if key is None:
            return None
        return f"{key}: {canonical_json(old.get(key))} there, {canonical_json(new.get(key))} now"

    def _open(self) -> None:
        for entry in self.output.parent.glob(f".{escape(self.output.name)}.*.tmp"):
            entry.unlink(missing_ok=True)  # half a zoo that a killed process left
        if (self.path / RECORD).exists() and self._difference() is not None:
            self._empty()
        if not (self.path / RECORD).exists():
            self._empty()
            with atomic_path(self.path / RECORD, overwrite=True) as temporary:
                temporary.write_text(json.dumps(self.work))
        self._load()

    def _empty(self) -> None:
        """Throw away all but the lock, the record last: a folder without one would be a stranger's."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == RECORD):
            if entry.name != LOCK:
                entry.unlink(missing_ok=True)

    def _load(self) -> None:
        """Count the blocks that are whole, and cut off what follows the last of them."""
        log = self.path / LOG
        if log.exists():
            with log.open("rb") as file:
                while (line := file.readline()) and self._take(line):
                    pass
        with self._writing():
            for rows in self._populations.values():
                os.truncate(rows.path, rows.size)
            if log.exists():
                os.truncate(log, self._end)

    def _take(self, line: bytes) -> bool:
        """Count a block; False if it is not whole."""
        try:
            entry = json.loads(line)
            notes = entry["notes"]
            blocks = {name: self._read(name, shape, dtype) for name, *shape, dtype in entry["rows"]}
            whole = line.endswith(b"\n") and entry["checksum"] == _checksum(notes, blocks.values())
        except (OSError, KeyError, TypeError, ValueError):  # however it was cut off
            return False
        if whole:
            self._count(blocks, notes, len(line))
        return whole

    def _read(self, name: str, shape: Sequence[int], dtype: str) -> np.ndarray:
        known = self._populations.get(name)
        path, at = (known.path, known.size) if known else (self._file(name), 0)
        return np.fromfile(path, dtype=dtype, count=math.prod(shape), offset=at).reshape(shape)

    def _count(self, blocks: Mapping[str, np.ndarray], notes: Sequence[Any], written: int) -> None:
        for name, block in blocks.items():
            if name not in self._populations:
                self._populations[name] = self._new(name, block)
            self._populations[name].rows += len(block)
            self.done += len(block)
        self.notes.extend(notes)
        self._end += written

    def _new(self, name: str, block: np.ndarray) -> _Rows:
        return _Rows(self._file(name), block.shape[1], block.dtype)

    def _file(self, name: str) -> Path:
        return self.path / f"rows-{quote(name, safe='')}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"output: {self.path} could not be written ({error.strerror})") from error


@dataclass
class _Rows:
    """The rows of one population.

    Args:
        path: of their file.
        parameters: in a row.
        dtype: of each.
        rows: that are there.
    """

    path: Path
    parameters: int
    dtype: np.dtype
    rows: int = 0

    @property
    def size(self) -> int:
        """Bytes that they take."""
        return self.rows * self.parameters * self.dtype.itemsize

    def mapped(self) -> np.ndarray:
        """All of them, from the disk."""
        return np.memmap(self.path, mode="r", dtype=self.dtype, shape=(self.rows, self.parameters))


def _write_at(path: Path, offset: int, content: bytes | memoryview) -> None:
    """Write behind what counts: over what an attempt that failed has left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        at = 0
        while at < len(content):
            at += os.pwrite(descriptor, content[at:], offset + at)
    finally:
        os.close(descriptor)


def _checksum(notes: Sequence[Any], blocks: Iterable[np.ndarray]) -> int:
    checksum = zlib.crc32(canonical_json(list(notes)).encode())
    for block in blocks:
        checksum = zlib.crc32(block.data.cast("B"), checksum)
    return checksum


def _is_ours(path: Path) -> bool:
    """A lock, or a temporary file that a killed process left."""
    return path.name == LOCK or path.suffix == ".tmp"
