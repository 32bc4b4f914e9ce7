"""State dicts from files, without running anything that a file says: pickles with plain tensors, and safetensors."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightspace.errors import DataError

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SAFE = ".safetensors"
SUFFIXES = (*PICKLES, SAFE)
_KEPT = 64  # pickles that are remembered; files that all differ in theirs would fill the memory
_WORD = 4  # bytes
_PARTS = 10_000  # of an object that is planned; a few bytes of pickle can stand for billions


class StateReader:
    """Reads the files of a population, of which most differ in nothing but numbers.

    A file that ``torch.save`` writes is an archive of one pickle, which says how the tensors are made from the
    numbers, and the numbers. ``torch.load`` with ``weights_only=True`` interprets the pickle every time, which takes
    nearly all of its 0.5 ms. Here it does so for the first file; for those whose pickle has the same bytes the numbers
    are taken from where they stood in the first one. Files that are anything else go to ``torch.load``.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[bytes, bytes], Any] = {}

    def read(self, path: str | Path) -> Any:
        """What ``torch.save`` was given: tensors in dictionaries, lists and tuples, and plain values.

        Raises:
            DataError: missing, damaged, or something that would have to be unpickled; the sentence begins with the
                reason, without the name of the file.
        """
        try:
            with open(path, "rb") as file:
                content = bytearray(os.fstat(file.fileno()).st_size)
                del content[file.readinto(content) :]
            archive = _Archive.parse(content)
            plan = None if archive is None else self._plan(archive, content)
            if archive is None or plan is None:
                _refuse_compressed(path, content)
                return _load(path)
            return _filled(plan, archive, content)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from None

    def _plan(self, archive: _Archive, content: bytearray) -> Any:
        """How to make the object of an archive from its numbers; None where that is not known."""
        key = (
            bytes(archive.record(content, "data.pkl") or b""),
            bytes(archive.record(content, "byteorder") or b""),
        )
        if key not in self._plans and len(self._plans) < _KEPT:
            self._plans[key] = _planned(archive, content)
        plan = self._plans.get(key)
        return plan if plan is not None and archive.fits(plan) else None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        DataError: missing or damaged; the sentence begins with the reason.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"not a readable safetensors file ({error})") from None


def _refuse_compressed(path: str | Path, content: bytearray) -> None:
    """Raise DataError for an archive that may be thousands of times as large as its file."""
    if content[:4] != b"PK\3\4":
        return
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # what is wrong is for torch to say
    if compressed:
        raise DataError("it is compressed, which torch.save never does; load it and save it again")


def _load(file: io.BytesIO | str | Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "WeightsUnpickler error: Unsupported" in str(error) or "Unsupported global" in str(error):
            raise DataError(
                "it pickles objects of its own classes, and nothing is unpickled here: that would run code; save plain "
                "state dicts instead"
            ) from None
        raise DataError("not a file that torch.save wrote, or damaged") from None
    except Exception as error:  # torch raises half a dozen kinds for what is damaged
        raise DataError(f"not a file that torch.save wrote, or damaged ({type(error).__name__})") from None


# -- archives ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Archive:
    """Where the records of a file of ``torch.save`` stand; only of archives as it writes them.

    Args:
        records: begin, length and checksum by name, without the folder's name.
        prefix: the folder's name, with its slash.
    """

    records: Mapping[str, tuple[int, int, int]]
    prefix: str

    @classmethod
    def parse(cls, content: bytearray) -> _Archive | None:
        """The archive, or None where it is another kind of file."""
        try:
            return cls._parsed(content)
        except (struct.error, ValueError, IndexError):  # whatever else it is
            return None

    @classmethod
    def _parsed(cls, content: bytearray) -> _Archive | None:
        signature, _, _, _, count, size, at, comment = _END.unpack_from(content, len(content) - _END.size)
        if signature != b"PK\5\6" or comment or at + size > len(content):
            return None
        records: dict[str, tuple[int, int, int]] = {}
        prefix = ""
        for _ in range(count):
            mark, method, checksum, packed, length, named, extra, noted, local = _ENTRY.unpack_from(
                content, at
            )
            name = content[at + _ENTRY.size : at + _ENTRY.size + named].decode()
            folder, _, record = name.partition("/")
            begin = local + 30 + sum(_LOCAL.unpack_from(content, local + 26))
            if mark != b"PK\1\2" or method or packed != length or begin + length > len(content):
                return None
            if prefix and folder != prefix:
                return None
            prefix, records[record] = folder, (begin, length, checksum)
            at += _ENTRY.size + named + extra + noted
        return cls(records, f"{prefix}/")

    def record(self, content: bytearray, name: str) -> bytearray | None:
        """The bytes of a record, if they are what was written."""
        begin, length, checksum = self.records.get(name, (0, 0, -1))
        found = content[begin : begin + length]
        return found if zlib.crc32(found) == checksum else None

    def fits(self, plan: _Plan) -> bool:
        """Whether the numbers are as many as in the file that the plan was made from."""
        return all(self.records.get(name, (0, -1))[1] == length for name, length in plan.lengths.items())


_END = struct.Struct("<4sHHHHIIH")
_ENTRY = struct.Struct(
    "<4s6xH4xIIIHHH8xI"
)  # signature, method, checksum, sizes, lengths, place of the local header
_LOCAL = struct.Struct("<HH")  # lengths of the name and of the padding in the local header


@dataclass(frozen=True)
class _Numbers:
    """A tensor: so many numbers of a record, from one of its bytes on."""

    record: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class _Plan:
    """An object with :class:`_Numbers` in the place of its tensors, and how long the records are."""

    tree: Any
    lengths: Mapping[str, int]


class _UnknownError(Exception):
    """A file for which there is no plan."""


def _planned(archive: _Archive, content: bytearray) -> _Plan | None:
    """Load the same pickle with numbers that say where they stood."""
    lengths = {name: length for name, (_, length, _) in archive.records.items() if name.startswith("data/")}
    firsts: dict[str, int] = {}
    words = 0
    doctored = io.BytesIO()
    with zipfile.ZipFile(doctored, "w") as file:
        for name in archive.records:
            record: bytearray | memoryview | None = archive.record(content, name)
            if record is None or (name in lengths and len(record) % _WORD):
                return None
            if name in lengths:
                firsts[name] = words
                count = len(record) // _WORD
                record = np.arange(words, words + count, dtype="<u4").data.cast("B")
                words += count
            file.writestr(f"{archive.prefix}{name}", record)
    doctored.seek(0)
    try:
        return _Plan(_located(_load(doctored), firsts, iter(range(_PARTS))), lengths)
    except (
        DataError,
        RecursionError,
        _UnknownError,
    ):  # the file itself is loaded next, and says what is wrong
        return None


def _located(value: Any, firsts: Mapping[str, int], left: Iterator[int]) -> Any:
    if next(left, None) is None:
        raise _UnknownError
    if isinstance(value, Tensor):
        return _numbers(value, firsts)
    if isinstance(value, Mapping):
        return {key: _located(entry, firsts, left) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_located(entry, firsts, left) for entry in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise _UnknownError


def _numbers(tensor: Tensor, firsts: Mapping[str, int]) -> _Numbers:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    plain = plain and tensor.device.type == "cpu" and not tensor.is_neg() and tensor.is_contiguous()
    if not plain or tensor.numel() == 0 or tensor.element_size() % _WORD or tensor.is_complex():
        raise _UnknownError
    words = tensor.detach().view(-1).view(torch.int32).numpy().view(np.uint32)
    first = int(words[0])
    if not np.array_equal(words, np.arange(first, first + len(words), dtype=np.uint32)):
        raise _UnknownError
    record = max((name for name, at in firsts.items() if at <= first), key=lambda name: firsts[name])
    return _Numbers(record, (first - firsts[record]) * _WORD, tensor.dtype, tensor.shape)


def _filled(plan: _Plan, archive: _Archive, content: bytearray) -> Any:
    for name in plan.lengths:
        if archive.record(content, name) is None:
            return _load(io.BytesIO(content))  # whether it is damaged is for torch to say
    return _tree(plan.tree, archive, content)


def _tree(value: Any, archive: _Archive, content: bytearray) -> Any:
    if type(value) is _Numbers:
        begin = archive.records[value.record][0] + value.offset
        count = value.shape.numel()
        return torch.frombuffer(content, dtype=value.dtype, count=count, offset=begin).view(value.shape)
    if type(value) is dict:
        return {key: _tree(entry, archive, content) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_tree(entry, archive, content) for entry in value)
    return value
