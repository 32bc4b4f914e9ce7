"""State dicts that ``torch.save`` wrote; nothing is unpickled but tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from weightspace.errors import CheckpointError
from weightspace.zoo.checkpoints._stored import HeldWeights

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs keep the state dict among other things."""


def read_state_dict(path: Path) -> HeldWeights:
    """The tensors of a ``.pt`` file, mapped from disk where the file is of the format since PyTorch 1.6.

    Raises:
        CheckpointError: the file is damaged, holds anything but plain data and tensors, or no state dict.
    """
    content = _loaded(path)
    if isinstance(content, Mapping) and not _is_state_dict(content):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if isinstance(content, Mapping) and content and _is_state_dict(content):
        _check_plain(path, content)
        return HeldWeights(content)
    raise CheckpointError(f"{path}: expected a state dict of tensors, found {_text(content)}")


def _loaded(path: Path) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            return torch.load(path, mmap=True, **options)
        except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
            return torch.load(path, **options)
    except UnpicklingError:
        raise CheckpointError(
            f"{path}: not a plain state dict that is safe to load: it holds other things than tensors, or is no "
            "file of PyTorch"
        ) from None
    except Exception as error:  # torch raises half a dozen kinds for what is damaged
        raise CheckpointError(
            f"{path}: not a readable file of PyTorch, it may be truncated ({type(error).__name__})"
        ) from None


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _check_plain(path: Path, content: Mapping[str, Tensor]) -> None:
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else "without values" if tensor.is_meta else "sparse"
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected a dense tensor, found one that is {kind}"
            )


def _text(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    if not content:
        return "an empty dict"
    odd = next(
        key for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)
    )
    return f"a dict in which {odd!r} is of type {type(content[odd]).__name__}"
