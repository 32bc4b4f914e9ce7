"""Linear assignment of many matrices at once."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.align._threads import share


def assign(scores: Float[Tensor, "rows size size"]) -> Int[Tensor, "rows size"]:
    """For every place the unit that goes there, such that the sum of scores is largest.

    The optimum is exact, up to the rounding of sums in float64. Where several are best, units tend to stay where
    they are. On a CPU, threads share the matrices; matrices of an accelerator are brought to the CPU and back.

    Args:
        scores: finite; float64 is taken as it is, everything else as float32.

    Returns:
        For row r the columns ``source`` that maximise ``sum over i of scores[r, i, source[i]]``, int64.

    Reference:
        Jonker and Volgenant 1987, "A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment
        Problems", Computing 38; without their augmenting row reduction, which costs more than it saves here.

    Example:
        >>> assign(torch.tensor([[[1.0, 5.0], [2.0, 7.0]]])).tolist()
        [[0, 1]]
    """
    from weightspace.align import _kernels  # numba takes a second to load

    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    matrices = np.require(scores.detach().to("cpu", dtype).numpy(), requirements=["C", "A", "W"])
    sources = np.empty(matrices.shape[:2], np.int64)
    counter = np.zeros(1, np.int64)
    share(len(matrices), _kernels.assign_all, matrices, sources, counter, counter=counter)
    return torch.from_numpy(sources).to(scores.device)
