"""The random numbers of :mod:`weightspace.datasets.augment._draws` in compiled code: one pass per network."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

# the constants of Giles 2010, "Approximating the erfinv function": in the middle, and in the tails
MIDDLE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip
M0, M1, M2, M3, M4, M5, M6, M7, M8 = (np.float32(value) for value in MIDDLE)
T0, T1, T2, T3, T4, T5, T6, T7, T8 = (np.float32(value) for value in TAIL)
STEP, FIRST, SECOND = np.uint32(0x9E3779B9), np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _mixed(x):
    """A bijection of 32-bit integers in which every bit depends on every other."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * FIRST)
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * SECOND)
    return np.uint32(x ^ (x >> np.uint32(16)))


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _bits(low, high, at):
    """32 random bits for a key of two halves and a counter."""
    return _mixed(np.uint32(_mixed(np.uint32(np.uint32(at * STEP) ^ low)) + high))


@njit(cache=True, nogil=True)
@no_type_check
def make_keys(items, low, high):
    """What :func:`weightspace.datasets.augment._draws.item_keys` computes."""
    keys = np.empty(len(items), np.int64)
    for at in range(len(items)):
        number = np.uint32(items[at] & np.int64(0xFFFFFFFF))
        upper = np.uint32((items[at] >> np.int64(32)) & np.int64(0xFFFFFFFF))
        first = _mixed(np.uint32(number ^ low))
        second = _mixed(np.uint32(_mixed(np.uint32(number + high)) ^ upper))
        keys[at] = np.int64(np.uint64(second) << np.uint64(32)) | np.int64(first)
    return keys


@njit(cache=True, nogil=True, inline="always")
@no_type_check
def _halves(key, call):
    """What :meth:`Draws.halves` computes."""
    salt = np.uint32(np.uint32(call) * STEP)
    low, high = np.uint32(key & np.int64(0xFFFFFFFF)), np.uint32((key >> np.int64(32)) & np.int64(0xFFFFFFFF))
    return _mixed(np.uint32(low ^ salt)), _mixed(np.uint32(high + salt))


@njit(cache=True, nogil=True, boundscheck=False)
@no_type_check
def uniform(keys, call, out):
    """Fill ``out`` (keys, count) with uniform numbers in [0, 1)."""
    scale = np.float32(2.0**-24)
    for row in range(out.shape[0]):
        low, high = _halves(keys[row], call)
        for at in range(out.shape[1]):
            out[row, at] = np.float32(np.int32(_bits(low, high, np.uint32(at)) >> np.uint32(8))) * scale


@njit(cache=True, nogil=True, boundscheck=False, fastmath={"contract", "arcp"}, error_model="numpy")
@no_type_check
def normal(keys, call, out):
    """Fill ``out`` (keys, count) with normal numbers.

    The loops are separate, and branches are products with masks, so that each is done for eight numbers at once.
    """
    count = out.shape[1]
    bits = np.empty(count, np.uint32)
    tail = np.empty(count, np.float32)  # the probability of anything further out
    product = np.empty(count, np.float32)
    logarithm = np.empty(count, np.float32)
    one, half = np.float32(1.0), np.float32(0.5)
    for row in range(out.shape[0]):
        low, high = _halves(keys[row], call)
        for at in range(count):
            bits[at] = _bits(low, high, np.uint32(at))
        for at in range(count):
            t = (np.float32(np.int32(bits[at] & np.uint32(0x7FFFFFFF))) + half) * np.float32(2.0**-31)
            tail[at] = t
            product[at] = t * (np.float32(2.0) - t)
        _log(product, logarithm)
        for at in range(count):
            w = -logarithm[at]
            c = w - np.float32(2.5)
            middle = M8 + c * (M7 + c * (M6 + c * (M5 + c * (M4 + c * (M3 + c * (M2 + c * (M1 + c * M0)))))))
            r = np.sqrt(np.abs(w)) - np.float32(3.0)
            outer = T8 + r * (T7 + r * (T6 + r * (T5 + r * (T4 + r * (T3 + r * (T2 + r * (T1 + r * T0)))))))
            z = (middle if w < np.float32(5.0) else outer) * (one - tail[at]) * np.float32(1.4142135623730951)
            sign = np.float32(np.int32(bits[at] >> np.uint32(31))) * np.float32(2.0) - one
            out[row, at] = z * sign


@njit(cache=True, nogil=True, boundscheck=False, fastmath={"contract", "arcp"}, error_model="numpy")
@no_type_check
def _log(values, out):
    """Natural logarithms of normal positive numbers: from the exponent and a series of the mantissa."""
    one, ln2 = np.float32(1.0), np.float32(0.6931471805599453)
    mantissa = np.empty(len(values), np.int32)
    patterns = values.view(np.int32)
    for at in range(len(values)):
        # around the root of 2, so that mantissas are in [0.71, 1.41)
        e = np.int32(np.int32(patterns[at] - np.int32(0x3F3504F3)) >> np.int32(23))
        out[at] = np.float32(e)
        mantissa[at] = np.int32(patterns[at] - np.int32(e * np.int32(8388608)))
    parts = mantissa.view(np.float32)
    for at in range(len(values)):
        f = (parts[at] - one) / (parts[at] + one)
        s = f * f
        series = one + s * (
            np.float32(1 / 3) + s * (np.float32(0.2) + s * (np.float32(1 / 7) + s * np.float32(1 / 9)))
        )
        out[at] = np.float32(2.0) * f * series + out[at] * ln2


@njit(cache=True, nogil=True, boundscheck=False, fastmath={"contract", "reassoc"}, error_model="numpy")
@no_type_check
def add_scaled(values, sizes, scale, noise):
    """Turn ``noise`` (rows, P) into ``values + scale * spread * noise``, with the spread of each of the tensors of a row."""
    for row in range(values.shape[0]):
        start = 0
        for size in sizes:
            total, squares = np.float32(0.0), np.float32(0.0)
            for at in range(start, start + size):
                total += values[row, at]
            mean = total / np.float32(size)
            for at in range(start, start + size):
                squares += (values[row, at] - mean) * (values[row, at] - mean)
            factor = np.float32(scale) * np.sqrt(squares / np.float32(size))
            for at in range(start, start + size):
                noise[row, at] = values[row, at] + factor * noise[row, at]
            start += size
