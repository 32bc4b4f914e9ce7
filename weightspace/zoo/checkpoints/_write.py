"""Checkpoints that are written tensor by tensor, so that no more than one is in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from weightspace.errors import CheckpointError, OutputError
from weightspace.zoo._files import atomic_path, canonical_json, check_output
from weightspace.zoo.checkpoints._safetensors import LENGTH, TYPES
from weightspace.zoo.checkpoints._stored import bytes_of, meta_of

SUFFIXES = (".safetensors", ".pt", ".pth")
_TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}


def check_checkpoint_output(path: Path, *, overwrite: bool) -> None:
    """Raise now what :func:`write_tensors` would raise after the work."""
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"output: expected a name that ends in {', '.join(SUFFIXES)}, found {path}")
    if path.is_dir():
        raise OutputError(f"output: expected the name of a file, found the directory {path}")
    check_output(path, overwrite=overwrite)


def save_network(
    path: str | Path,
    weights: Mapping[str, Tensor],
    architecture: Mapping[str, object] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one network, as safetensors with its architecture in the metadata, or as a state dict.

    Args:
        path: ends in ``.safetensors``, ``.pt`` or ``.pth``; the latter two hold the tensors alone.
        weights: tensors by name; a network that is read lazily is copied one tensor at a time.
        architecture: JSON for ``nets.build``.
        metadata: further texts for the header.
        overwrite: replace a file that exists.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is False, or it cannot be written.
        CheckpointError: ``path`` has another suffix, or a tensor a type that safetensors lacks.
    """
    layout = {name: meta_of(weights, name) for name in weights}
    texts = {**({"architecture": canonical_json(architecture)} if architecture else {}), **(metadata or {})}
    tensors = ((name, weights[name]) for name in weights)
    return write_tensors(path, layout, tensors, texts, overwrite=overwrite)


def write_tensors(
    path: str | Path,
    layout: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write tensors as they come, in any order, under a temporary name that becomes ``path`` at the end.

    Args:
        path: ends in ``.safetensors``; ``.pt`` and ``.pth`` are written in one piece, from memory.
        layout: shape and type of every tensor that will come, meta tensors for instance.
        tensors: each name of the layout once.
        metadata: texts for the header of safetensors.
        overwrite: replace a file that exists.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is False, it does not fit on the disk, or cannot be written.
        CheckpointError: ``path`` has another suffix, or a tensor a type that safetensors lacks.
    """
    path = Path(path)
    check_checkpoint_output(path, overwrite=overwrite)
    _check_space(path, sum(map(bytes_of, layout.values())))
    with atomic_path(path, overwrite=overwrite) as temporary:
        if path.suffix == ".safetensors":
            with temporary.open("wb") as file:
                _write(file, layout, tensors, metadata or {})
        else:
            torch.save({name: _plain(tensor) for name, tensor in tensors}, temporary)
    return path


def free_space(path: Path) -> int:
    """Bytes that are free where ``path`` would be written."""
    return shutil.disk_usage(path.parent).free


def _check_space(path: Path, needed: int) -> None:
    free = free_space(path)
    if needed > free:
        raise OutputError(
            f"output: {path} could not be written: it takes {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there"
        )


def _write(
    file: BinaryIO,
    layout: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    header, places = _header(layout, metadata)
    file.write(header)
    missing = dict(layout)
    for name, tensor in tensors:
        expected = missing.pop(name)
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
        file.seek(len(header) + places[name])
        file.write(_bytes(tensor))
        del tensor  # before the next one is made
    assert not missing, f"tensors that did not come: {', '.join(missing)}"


def _header(layout: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header with its length in front, and where behind it each tensor begins; wide types first, for alignment."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    places, begin = {}, 0
    for name, meta in sorted(layout.items(), key=lambda item: -item[1].element_size()):
        if meta.dtype not in _TYPE_NAMES:
            raise CheckpointError(f"output: safetensors has no type for {name!r}, {meta.dtype}")
        end = begin + bytes_of(meta)
        entries[name] = {
            "dtype": _TYPE_NAMES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [begin, end],
        }
        places[name], begin = begin, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that all tensors are aligned
    return len(text).to_bytes(LENGTH, "little") + text, places


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, with a storage of its own where it is only a part of one, as a row of a zoo is."""
    found = tensor.detach().cpu()
    whole = found.untyped_storage().nbytes() == bytes_of(found)
    return found if whole else found.clone(memory_format=torch.contiguous_format)
