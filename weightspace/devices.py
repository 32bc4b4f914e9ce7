"""Where tensors live: the one place that decides between CPU and CUDA."""

from __future__ import annotations

import torch

from weightspace.errors import DeviceError

__all__ = ["choose_device"]


def choose_device(name: str) -> str:
    """``"cpu"`` or ``"cuda"`` for ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        DeviceError: CUDA is asked for and not available, or the name is unknown.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device: expected auto, cpu or cuda, found {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError(
            "device: cuda was asked for, but PyTorch finds no CUDA device here; use --device cpu"
        )
    return "cuda" if available and name != "cpu" else "cpu"
