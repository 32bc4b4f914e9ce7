"""Compiled calls on several threads, which share jobs by drawing tickets."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_NONE_LEFT = 2**62


def share(jobs: int, kernel: Callable[..., None], *arguments: Any, counter: np.ndarray) -> None:
    """Call ``kernel(*arguments)`` on as many threads as PyTorch uses, this one among them.

    Args:
        jobs: how many there are; a single one is done in this thread.
        kernel: compiled, without the interpreter's lock; it draws numbers of jobs until none are left.
        arguments: its arguments.
        counter: (1,) int64, that among the arguments from which it draws.
    """
    threads = min(torch.get_num_threads(), os.cpu_count() or 1, jobs)
    pool = _pool(os.getpid(), threads - 1) if threads > 1 else None
    calls = [pool.submit(kernel, *arguments) for _ in range(threads - 1)] if pool is not None else []
    try:
        kernel(*arguments)
        for call in calls:
            if not call.cancel():  # a thread that a busy machine has not started by now finds nothing left
                call.result()
    finally:
        counter[0] = _NONE_LEFT  # after an exception the others end with the jobs they are at


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of this process: those of the process that it was forked from do not run here."""
    return ThreadPoolExecutor(threads, thread_name_prefix="weightspace-align")
