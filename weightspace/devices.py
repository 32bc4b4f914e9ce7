"""Where tensors live: the one place that knows of CPU, CUDA, and the allocator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from weightspace.errors import DeviceError, WeightspaceError

__all__ = ["choose_device", "keep_freed_memory", "memory_guard"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # beyond it glibc refuses
# PyTorch has no class for these: its allocator on a CPU, and sizes beyond 64 bits
_TOO_LARGE = (
    "alloc_cpu",
    "not enough memory",
    "can't allocate memory",
    "Storage size calculation overflowed",
    "integer multiplication overflow",
    "Overflow when unpacking long",
)


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


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next tensors, instead of giving it back to the system.

    Training on a CPU frees and allocates tensors of several megabytes in every step. glibc returns them to the
    system, which then zeroes every page again at its first use: a step of DWS took 108 ms so, and 86 ms with the
    memory kept (``benchmarks/metanetwork_speed.py``, with and without ``--plain-malloc``).

    Returns:
        Whether the C library took the setting; others than glibc do not have it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and kept)


@contextmanager
def memory_guard(message: str) -> Iterator[None]:
    """Raise DeviceError with ``message`` when a tensor does not fit into memory, on a CPU or a GPU.

    Example:
        >>> with memory_guard("batch_size: too large for this machine"):
        ...     torch.empty(2**60)
        Traceback (most recent call last):
        weightspace.errors.DeviceError: batch_size: too large for this machine
    """
    try:
        yield
    except WeightspaceError:
        raise
    except (torch.OutOfMemoryError, MemoryError):
        raise DeviceError(message) from None
    except (RuntimeError, TypeError) as error:
        if not any(sign in str(error) for sign in _TOO_LARGE):
            raise
        raise DeviceError(message) from None
