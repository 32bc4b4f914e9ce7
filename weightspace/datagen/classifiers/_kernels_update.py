"""The update of :mod:`weightspace.datagen.classifiers._optimizers` in compiled code: one pass over the numbers."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

# columns of the coefficients
COUPLED_DECAY, MOMENTUM, NEW, MEMORY, FRESH, RATE, SCALE, KEPT = range(8)


@njit(cache=True, nogil=True, fastmath={"contract"}, boundscheck=False)
@no_type_check
def update(weights, gradients, first, second, coefficients, adaptive, epsilon, moved, finite):
    """Write the new weights of every network to ``moved``, and whether all are finite; moments are updated in place.

    In PyTorch the same takes ten passes over arrays that no cache holds, with a barrier between threads after each:
    for 64 networks of 3,466 parameters 35 ms on two cores that another program keeps busy, here 0.26 ms on one.
    """
    for network in range(weights.shape[0]):
        row = coefficients[network]
        decay, momentum, new = row[COUPLED_DECAY], row[MOMENTUM], row[NEW]
        memory, fresh, rate = row[MEMORY], row[FRESH], row[RATE]
        scale, kept = row[SCALE], row[KEPT]
        zero = np.float32(0.0)
        if adaptive[network]:
            for at in range(weights.shape[1]):
                w = weights[network, at]
                g = gradients[network, at] + decay * w
                m = momentum * first[network, at] + new * g
                v = memory * second[network, at] + fresh * (g * g)
                first[network, at] = m
                second[network, at] = v
                new_w = kept * w - rate * m / (np.sqrt(v * scale) + epsilon)
                moved[network, at] = new_w
                zero += new_w * np.float32(0.0)  # NaN from then on
        else:
            for at in range(weights.shape[1]):
                w = weights[network, at]
                m = momentum * first[network, at] + new * (gradients[network, at] + decay * w)
                first[network, at] = m
                new_w = w - rate * m
                moved[network, at] = new_w
                zero += new_w * np.float32(0.0)
        finite[network] = zero == 0.0
