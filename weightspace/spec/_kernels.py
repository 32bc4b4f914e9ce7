"""Group elements acting on flattened networks, in compiled code; see :mod:`weightspace.spec._flat`."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")
@no_type_check
def act(flat, units, sizes, first, base, unit, stride, values, factor, steps, shift, out):
    """Write what the elements make of the networks ``flat`` (networks, P) to ``out``; False for what is no permutation.

    ``units`` (networks, U + 1) holds the permutations, ``sizes`` (U + 1,) what each is below and ``first`` (U + 1,) where
    its permutation begins; entry ``at`` of a network is read from ``base[at] + sum over d of units[unit[d, at]] *
    stride[d, at]``, multiplied by all ``values[factor[d, at]]``, and ``steps[shift[d, at]]`` are added. The last columns
    change nothing: lists of unequal lengths are filled with them.
    """
    source = np.empty(flat.shape[1], np.int32)
    seen = np.full(len(sizes), -1, np.int64)
    for network in range(flat.shape[0]):
        moved, value, step, result = units[network], values[network], steps[network], out[network]
        for at in range(len(sizes)):
            if moved[at] < 0 or moved[at] >= sizes[at]:
                return False
            if seen[first[at] + moved[at]] == network:
                return False
            seen[first[at] + moved[at]] = network
        # one pass per list, each over arrays that the first cache holds
        source[:] = base
        for d in range(unit.shape[0]):
            for at in range(flat.shape[1]):
                source[at] += moved[unit[d, at]] * stride[d, at]
        for at in range(flat.shape[1]):
            result[at] = flat[network, source[at]]
        for d in range(factor.shape[0]):
            for at in range(flat.shape[1]):
                result[at] *= value[factor[d, at]]
        for d in range(shift.shape[0]):
            for at in range(flat.shape[1]):
                result[at] += step[shift[d, at]]
    return True
