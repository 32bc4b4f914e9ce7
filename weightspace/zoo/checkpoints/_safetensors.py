"""Safetensors files, single and sharded, of which each tensor is mapped by itself and only while it is in use.

The layout is that of https://github.com/huggingface/safetensors: the length of a header as eight bytes, the header in
JSON with type, shape and place of every tensor, and the tensors' bytes.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightspace.errors import CheckpointError
from weightspace.zoo.checkpoints._stored import StoredWeights

INDEX = ".safetensors.index.json"
LENGTH = 8  # bytes that hold the length of the header
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsWeights(StoredWeights):
    """The tensors of a safetensors file in the order in which they stand there.

    Args:
        path: of the file.

    Attributes:
        metadata: texts by name, as they stand in the header.

    Raises:
        CheckpointError: the file is truncated, damaged, of another format, or holds a type that PyTorch lacks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = _header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        for name, entry in header.items():
            if entry["dtype"] not in TYPES:
                raise CheckpointError(
                    f"{path}: tensor {name!r}: expected a type of {', '.join(TYPES)}, found {entry['dtype']}"
                )
        self._entries = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        self._file = path.open("rb")
        self._begin = LENGTH + int.from_bytes(self._file.read(LENGTH), "little")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def meta(self, name: str) -> Tensor:
        """See :meth:`StoredWeights.meta`."""
        entry = self._entries[name]
        return torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]], device="meta")

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        dtype, (first, last) = TYPES[entry["dtype"]], entry["data_offsets"]
        if first == last:
            return torch.empty(entry["shape"], dtype=dtype)
        return self._mapped(self._begin + first, last - first).view(dtype).view(entry["shape"])

    def _mapped(self, first: int, length: int) -> Tensor:
        """Bytes of the file, mapped by themselves: their pages are given back when the tensor is."""
        page = first - first % mmap.ALLOCATIONGRANULARITY
        try:
            # a private copy: whoever writes to the tensor does not write to the file
            pages = mmap.mmap(
                self._file.fileno(), first - page + length, access=mmap.ACCESS_COPY, offset=page
            )
        except (OSError, ValueError) as error:  # it was changed meanwhile
            raise CheckpointError(f"{self.path}: cannot be read any more ({error})") from None
        if hasattr(pages, "madvise"):
            pages.madvise(mmap.MADV_SEQUENTIAL)
        found = torch.frombuffer(pages, dtype=torch.uint8, offset=first - page)
        return found if first % 8 == 0 else found.clone()  # other writers than most do not align


class ShardedWeights(StoredWeights):
    """The tensors of several safetensors files that one index names.

    Args:
        index: the file ``*.safetensors.index.json``.

    Attributes:
        files: the index and all files that it names.
        metadata: that of the first file.

    Raises:
        CheckpointError: the index or a file is damaged or missing, or they contradict each other.
    """

    def __init__(self, index: Path) -> None:
        places = _weight_map(index)
        self._shards = {name: self._shard(index, name) for name in dict.fromkeys(places.values())}
        self._places = places
        self.files = (index, *(shard.path for shard in self._shards.values()))
        self.metadata = next((shard.metadata for shard in self._shards.values()), {})
        for name, place in places.items():
            if name not in self._shards[place]:
                raise CheckpointError(f"{index}: tensor {name!r} should be in {place}, which has none")
        for place, shard in self._shards.items():
            stray = next((name for name in shard if places.get(name) != place), None)
            if stray is not None:
                raise CheckpointError(f"{index}: tensor {stray!r} of {place} is not listed in it")

    @staticmethod
    def _shard(index: Path, name: str) -> SafetensorsWeights:
        if not name or name == ".." or Path(name).name != name:
            raise CheckpointError(f"{index}: expected names of files beside it, found {name!r}")
        path = index.with_name(name)
        if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            raise CheckpointError(f"{index}: the file {name} that it names is missing")
        return SafetensorsWeights(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def meta(self, name: str) -> Tensor:
        """See :meth:`StoredWeights.meta`."""
        return self._shards[self._places[name]].meta(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self._places[name]][name]


def find_index(folder: Path) -> Path:
    """The one checkpoint of a folder: the index of its shards, or its only safetensors file.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    for pattern in (f"*{INDEX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(path.name for path in found[:3])
            raise CheckpointError(
                f"{folder}: expected one checkpoint in this folder, found {listed}; name one"
            )
    raise CheckpointError(
        f"{folder}: expected a folder with model{INDEX} or one .safetensors file, found neither"
    )


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt"):  # checks types, shapes, places and the length of the file
            pass
        with path.open("rb") as file:
            found = json.loads(file.read(int.from_bytes(file.read(LENGTH), "little")))
        assert isinstance(found, dict)
        return found
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(found, dict) or not found or not all(isinstance(f, str) for f in found.values()):
            raise ValueError("weight_map should map names of tensors to files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a readable index of safetensors files ({error})") from None
    return found
