"""The folder in which finished shards wait, and the state of those that are not finished."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from weightspace.errors import ConfigError, OutputError, WeightspaceError
from weightspace.zoo import (
    Zoo,
    atomic_path,
    canonical_json,
    hold_lock,
    lock_holder,
    own_name,
    verify_digest,
)

SAVE_EVERY = 120.0  # seconds between two states of a shard
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Every ``of``-th shard, beginning with the ``index``-th: what one job of an array makes.

    Args:
        index: from 1.
        of: number of parts.

    Example:
        >>> Part.parse("2/3").select("abcdefg")
        ['b', 'e']
    """

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """``"3/16"``: the third of sixteen.

        Raises:
            ConfigError: not of this form, or no such part.
        """
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        part = cls(int(match[1]), int(match[2])) if match else None
        if part is None or not 1 <= part.index <= part.of:
            raise ConfigError(
                f"shards: expected I/N with I from 1 to N, such as 3/16 for the third of 16 parts, found {text!r}"
            )
        return part

    def select(self, shards: Sequence[T]) -> list[T]:
        """The shards of this part."""
        return list(shards[self.index - 1 :: self.of])

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


class ShardState:
    """Where a shard that takes long keeps what it has, so that a killed process loses minutes.

    Args:
        path: of the file; None for a shard that keeps nothing.
        every: seconds between two states.
    """

    def __init__(self, path: Path | None = None, every: float = SAVE_EVERY) -> None:
        self.path, self.every, self._saved = path, every, time.monotonic()

    def load(self) -> dict[str, np.ndarray] | None:
        """The arrays that were saved last; None where there are none, or they are damaged."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                claimed = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # however it is damaged
            return None
        return arrays if claimed == _digest(arrays) else None

    @property
    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return self.path is not None and time.monotonic() - self._saved >= self.every

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace what was saved, at once or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        assert self.path is not None
        kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:
            with atomic_path(self.path, overwrite=True) as temporary:
                save_file(kept, temporary, metadata={"digest": _digest(kept)})
        except SafetensorError as error:  # which it makes of a full disk
            raise OutputError(f"output: {self.path} could not be written ({_reason(error)})") from None
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The shard is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _reason(error: SafetensorError) -> str:
    told = re.search(r"os error (\d+)", str(error))
    return os.strerror(int(told[1])) if told else str(error)


class ShardFolder:
    """Shards of one zoo: ``OUT.h5.parts``, with a record of what they were made from.

    Args:
        output: the zoo that they will be joined into.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.parts")
        self.record = self.path / "recipe.json"

    def open(self, plan: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder, or continue in one of the same plan.

        Args:
            plan: what all shards have in common, as JSON.
            overwrite: throw away the shards of another plan.

        Raises:
            OutputError: the folder is none of shards, or one of another plan, or cannot be written.
        """
        # two parts that start with --overwrite at once: the later one has to see the plan of the earlier
        with hold_lock(self.path / "lock-open", None, shared=False, wait=True):
            self.check(plan, overwrite=overwrite)
            if self.record.exists() and _difference(self.record, plan) is not None:
                self._empty()
            if not self.record.exists():
                with atomic_path(self.record, overwrite=True) as temporary:
                    temporary.write_text(canonical_json(plan))

    def plan(self) -> dict[str, Any]:
        """What the shards were made from.

        Raises:
            OutputError: there is no such folder, or its record is damaged.
        """
        if not self.record.is_file():
            raise OutputError(f"output: {self.path} is no folder of shards (it has no recipe.json)")
        try:
            found = json.loads(self.record.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
            raise OutputError(f"output: {self.record} is damaged; generate the shards again with --overwrite")
        return found

    def check(self, plan: Mapping[str, Any], *, overwrite: bool) -> None:
        """Raise OutputError for a folder that :meth:`open` would refuse; changes nothing."""
        if self.path.exists() and not self.record.exists() and _holds_files(self.path):
            raise OutputError(
                f"output: {self.path} is no folder of shards (it has no recipe.json); move it away"
            )
        difference = _difference(self.record, plan) if self.record.exists() else None
        if difference is not None and not overwrite:
            raise OutputError(
                f"output: {self.path} holds shards of another recipe ({difference}); "
                "choose another name or pass --overwrite"
            )

    def tidy(self) -> None:
        """Delete what killed processes left half written; to be called by the only writer."""
        stale = re.compile(rf"\.{re.escape(self.output.name)}\.[0-9a-f-]+\.tmp")
        for entry in [*self.output.parent.iterdir(), *self.path.iterdir()]:
            if stale.fullmatch(entry.name) or (entry.parent == self.path and entry.suffix == ".tmp"):
                entry.unlink(missing_ok=True)

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.path / f"shard-{number:05d}.h5"

    def state(self, number: int, every: float = SAVE_EVERY) -> ShardState:
        """Where a shard keeps what it has before it is finished."""
        return ShardState(self.path / f"shard-{number:05d}.state", every)

    def has(self, number: int) -> bool:
        """Whether a shard is there and can be read; its checksum is verified when it is joined."""
        path = self.shard(number)
        if not path.exists():
            return False
        try:
            Zoo.open(path)
        except WeightspaceError:
            return False
        return True

    def is_sound(self, number: int) -> bool:
        """Whether a shard is there and its checksum holds."""
        try:
            verify_digest(self.shard(number))
        except WeightspaceError:
            return False
        return True

    def save(self, number: int, zoo: Zoo) -> None:
        """Write a finished shard, and forget its state."""
        zoo.save(self.shard(number), overwrite=True)
        self.state(number).remove()

    def save_file(self, number: int, content: bytes | memoryview) -> None:
        """Write a finished shard that was made elsewhere, and forget its state."""
        with atomic_path(self.shard(number), overwrite=True) as temporary:
            temporary.write_bytes(content)
        self.state(number).remove()

    def discard(self, number: int) -> None:
        """Forget a shard whose checksum does not hold."""
        self.shard(number).unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """Bytes that the finished shards take."""
        return sum(path.stat().st_size for path in self.path.glob("shard-*.h5"))

    def remove(self) -> None:
        """All has been joined; to be called by the holder of the lock."""
        if not self.path.exists():
            return
        self._empty()
        for entry in self.path.iterdir():
            entry.unlink(missing_ok=True)
        with suppress(OSError):  # somebody has just come to see whether there is anything to do
            self.path.rmdir()

    def _empty(self) -> None:
        """Throw away all but the locks, the record last: a folder without one would be a stranger's."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry == self.record):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif not _is_lock(entry):
                entry.unlink(missing_ok=True)

    @contextmanager
    def locked(self, part: Part | None = None) -> Iterator[None]:
        """Keep other processes from writing the same shards; the system frees the lock of one that is killed.

        Args:
            part: of the shards that is written: processes with different parts of one division may run at the same
                time. None for all shards, which excludes all others.

        Raises:
            OutputError: another process writes them, or the folder cannot be written.
        """
        me = own_name()
        with ExitStack() as stack:
            if part is None:
                stack.enter_context(hold_lock(self.path / "lock", me, shared=False))
            else:
                me = f"{me} (--shards {part})"
                stack.enter_context(hold_lock(self.path / "lock", None, shared=True))
                stack.enter_context(
                    hold_lock(self.path / f"lock-{part.index}-of-{part.of}", me, shared=False)
                )
                self._check_division(part)
            yield

    def _check_division(self, part: Part) -> None:
        """Parts of two divisions would overlap."""
        for entry in self.path.glob("lock-*-of-*"):
            if not entry.name.endswith(f"-of-{part.of}") and (holder := lock_holder(entry)):
                raise OutputError(
                    f"output: {self.path} is being written by {holder}; use the same number of parts, or wait for it"
                )


def _is_lock(path: Path) -> bool:
    return re.fullmatch(r"lock(-open|-\d+-of-\d+)?", path.name) is not None


def _holds_files(folder: Path) -> bool:
    """Whether there is anything but locks and the temporary files that a killed process leaves."""
    return not folder.is_dir() or any(
        entry.suffix != ".tmp" and not _is_lock(entry) for entry in folder.iterdir()
    )


def _difference(record: Path, plan: Mapping[str, Any]) -> str | None:
    """The first field in which two plans differ, in words; None where they agree."""
    try:
        old = json.loads(record.read_bytes())
    except ValueError:
        old = None
    new = json.loads(canonical_json(plan))
    if not isinstance(old, dict) or set(old) != set(new) or not isinstance(old["recipe"], dict):
        return "its recipe.json is damaged"
    old, new = ({**plan.pop("recipe"), **plan} for plan in (old, new))
    key = next((key for key in sorted({*old, *new}) if old.get(key) != new.get(key)), None)
    if key is None:
        return None
    if key == "data":
        return "the source's items differ"
    return f"{key}: {canonical_json(old.get(key))} there, {canonical_json(new.get(key))} now"
