# mypy: ignore-errors
"""Loss and gradient of small classifiers, one network from the inputs to the gradient inside one compiled call.

`LANES` images at a time (a *group*) go through the whole network and back, so that the activations stay in the
L2 cache. The images of a group are the SIMD axis, whatever the channels and kernels: an image of the network is
stored as ``(height, width, channels, LANES)``, and everything that is computed is a sum of products of such
vectors with scalars (weights) or with each other (gradients of weights).

The kernel interprets a *plan*: rows of integers that say which operation reads and writes where. All the
geometry of strides, paddings, kernels and shortcuts is in tables of offsets, made once for an architecture in
`_classifier_kernel.py`, so nothing is compiled again for another architecture. Convolutions read images with
their padding stored around them, and so have no special cases at borders; the gradient of a strided
convolution's input is one such product for each phase of the stride.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from weightspace.datagen._kernels import (
    _EXACT,
    _EXP2,
    _EXP_LOWEST,
    _INT32,
    _LOG2_E,
    _LOG2_E_LOW,
    _ONE,
    _ROUND,
    _VECTOR,
    _ZERO,
    LANES,
    _counted_loop,
    _data,
    _fma,
    _load_vector,
    _multiply_add,
    _power_of_two,
    _splat,
    _sums_of,
    _vector_pointer,
    gaussian,
    sine,
    tanh,
)

# Operations of a plan. Each is one row of `FIELDS` integers, the first of which is its code; the others are
# listed at its function below.
FIELDS = 16
INPUT, PRODUCT, ACTIVATE, DROP, POOL_MEAN, POOL_MAX, LOSS = 0, 1, 2, 3, 4, 5, 6
UNPOOL_MEAN, UNPOOL_MAX, GRADIENT, BIAS, SLOPE, CLEAR, ADD = 7, 8, 9, 10, 11, 12, 13
NORM, NORM_BACKWARD = 14, 15

# What becomes of a result: stored; made positive; times the derivative of the activation, which is stored or
# can be read off the activation (ReLU); added to what is there.
STORE, POSITIVE, TIMES_SLOPE, WHERE_POSITIVE, ACCUMULATE = 0, 1, 2, 3, 4

RELU, TANH, LEAKY_RELU, GELU, SILU, SIGMOID, SINE, GAUSSIAN = 0, 1, 2, 3, 4, 5, 6, 7

# Register blocks: 8 x 3 and 4 x 6 accumulators need the 32 registers of AVX-512 (or NEON).
_WIDE = LANES != 8
PRODUCT_ROWS = (8, 4, 2, 1) if _WIDE else (4, 2, 1)
GRADIENT_COLUMNS = (6, 3, 2, 1) if _WIDE else (3, 2, 1)
GRADIENT_ROWS = (4, 2, 1)

KEEP_ALL = -(2**31)  # the threshold below which no random word is
_FACTOR = 0x45D9F3B  # of `weightspace.nets._dropout`


# ---------------------------------------------------------------------------------- register-blocked products


def _product_block(rows: int, vectors: int):
    """Intrinsic for ``rows`` outputs at ``vectors`` positions.

    ``out[p, r] = sum_{s, k} w[(s run + k) rows + r] x[x_p + s pitch + k LANES]`` plus ``w[bias_at + r]``, where
    ``table`` holds, for each position, the offsets of the input, of the output and of the derivative.
    """

    @intrinsic
    @no_type_check
    def block(
        typing_context,
        w,
        w_at,
        bias_at,
        x,
        table,
        table_at,
        shift,
        segments,
        pitch,
        run,
        mode,
        scale,
    ):
        def generate(context, builder, signature, arguments):
            w_v, w_at, bias_at, x_v, table_v, table_at, shift, segments, pitch, run, mode, scale = arguments
            w_data = _data(context, builder, signature.args[0], w_v)
            x_data = _data(context, builder, signature.args[3], x_v)
            table_data = _data(context, builder, signature.args[4], table_v)
            intp = run.type
            zero = ir.Constant(_VECTOR, [0.0] * LANES)

            def constant(n):
                return ir.Constant(intp, n)

            offsets = []
            for p in range(3 * vectors):
                offsets.append(builder.load(builder.gep(table_data, [builder.add(table_at, constant(p))])))

            def outer(s, carried):
                segment = builder.mul(s, pitch)
                starts = [builder.gep(x_data, [builder.add(offsets[3 * p], segment)]) for p in range(vectors)]
                w_start = builder.add(w_at, builder.mul(builder.mul(s, run), constant(rows)))
                weights = builder.gep(w_data, [w_start])

                def inner(k, sums):
                    at = builder.mul(k, constant(LANES))
                    columns = [_load_vector(builder, start, at) for start in starts]
                    w_k = builder.mul(k, constant(rows))
                    results = []
                    for r in range(rows):
                        pointer = builder.gep(weights, [builder.add(w_k, constant(r))])
                        weight = _splat(builder, builder.load(pointer))
                        for p in range(vectors):
                            results.append(_fma(builder, weight, columns[p], sums[r * vectors + p]))
                    return results

                return _counted_loop(builder, run, 1, carried, inner)

            initial = []
            for r in range(rows):
                pointer = builder.gep(w_data, [builder.add(bias_at, constant(r))])
                initial += [_splat(builder, builder.load(pointer))] * vectors
            sums = _counted_loop(builder, segments, 1, initial, outer)

            factor = _splat(builder, scale)
            end = builder.append_basic_block("stored")
            blocks = [builder.append_basic_block("mode") for _ in range(5)]
            switch = builder.switch(mode, blocks[0])
            for code in range(1, 5):
                switch.add_case(constant(code), blocks[code])
            for code, entry in enumerate(blocks):
                builder.position_at_end(entry)
                for p in range(vectors):
                    out_at = builder.add(offsets[3 * p + 1], shift)
                    aux_at = builder.add(offsets[3 * p + 2], shift)
                    for r in range(rows):
                        value = sums[r * vectors + p]
                        lane = constant(r * LANES)
                        pointer = _vector_pointer(builder, x_data, builder.add(out_at, lane))
                        if code == POSITIVE:
                            # In this direction a NaN stays one.
                            negative = builder.fcmp_ordered("<", value, zero)
                            value = builder.select(negative, zero, value)
                        elif code == TIMES_SLOPE:
                            slope = _load_vector(builder, x_data, builder.add(aux_at, lane))
                            value = builder.fmul(value, slope)
                        elif code == WHERE_POSITIVE:
                            h = _load_vector(builder, x_data, builder.add(aux_at, lane))
                            active = builder.fcmp_ordered(">", h, zero)
                            value = builder.select(active, builder.fmul(value, factor), zero)
                        elif code == ACCUMULATE:
                            value = builder.fadd(value, builder.load(pointer, align=4))
                        builder.store(value, pointer, align=4)
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        intp = types.intp
        return types.void(
            w, intp, intp, x, table, intp, intp, intp, intp, intp, intp, types.float32
        ), generate

    return block


def _gradient_block(rows: int, columns: int):
    """Intrinsic that adds to ``g[r, c]`` the sum over positions and lanes of ``d[d_p + r] x[x_p + c]``.

    ``g`` receives the ``rows * columns`` sums one after the other, padded to whole vectors.
    """

    @intrinsic
    @no_type_check
    def block(typing_context, x, table, table_at, positions, d_shift, x_shift, g, g_at):
        def generate(context, builder, signature, arguments):
            x_v, table_v, table_at, positions, d_shift, x_shift, g_v, g_at = arguments
            x_data = _data(context, builder, signature.args[0], x_v)
            table_data = _data(context, builder, signature.args[1], table_v)
            g_data = _data(context, builder, signature.args[6], g_v)
            intp = positions.type
            table_data = builder.gep(table_data, [table_at])
            d_data = builder.gep(x_data, [d_shift])
            x_data = builder.gep(x_data, [x_shift])

            def body(p, carried):
                at = builder.mul(p, ir.Constant(intp, 3))
                x_at = builder.load(builder.gep(table_data, [at]))
                d_at = builder.load(builder.gep(table_data, [builder.add(at, ir.Constant(intp, 1))]))

                def vectors(data, start, count):
                    return [
                        _load_vector(builder, data, builder.add(start, ir.Constant(intp, i * LANES)))
                        for i in range(count)
                    ]

                left, right = vectors(d_data, d_at, rows), vectors(x_data, x_at, columns)
                return [
                    _fma(builder, left[r], right[c], carried[r * columns + c])
                    for r in range(rows)
                    for c in range(columns)
                ]

            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            sums = _counted_loop(builder, positions, 1, [zero] * (rows * columns), body)
            sums += [zero] * (-len(sums) % LANES)
            for i in range(0, len(sums), LANES):
                total = _sums_of(builder, sums[i : i + LANES])
                pointer = _vector_pointer(builder, g_data, builder.add(g_at, ir.Constant(intp, i)))
                builder.store(builder.fadd(builder.load(pointer, align=4), total), pointer, align=4)
            return context.get_dummy_value()

        intp = types.intp
        return types.void(x, table, intp, intp, intp, intp, g, intp), generate

    return block


def _product_rows(rows: int):
    """All positions for one block of rows."""
    three, two, one = (_product_block(rows, vectors) for vectors in (3, 2, 1))

    @njit(nogil=True, error_model="numpy")
    @no_type_check
    def product(
        w, w_at, bias_at, buffer, table, table_at, positions, shift, segments, pitch, run, mode, scale
    ):
        p = 0
        if _WIDE:
            while p + 3 <= positions:
                at = table_at + 3 * p
                three(w, w_at, bias_at, buffer, table, at, shift, segments, pitch, run, mode, scale)
                p += 3
        while p + 2 <= positions:
            at = table_at + 3 * p
            two(w, w_at, bias_at, buffer, table, at, shift, segments, pitch, run, mode, scale)
            p += 2
        if p < positions:
            at = table_at + 3 * p
            one(w, w_at, bias_at, buffer, table, at, shift, segments, pitch, run, mode, scale)

    return product


_product_8, _product_4, _product_2, _product_1 = (_product_rows(rows) for rows in (8, 4, 2, 1))
_gradient_4x6, _gradient_4x3 = _gradient_block(4, 6), _gradient_block(4, 3)
_gradient_4x2, _gradient_4x1 = _gradient_block(4, 2), _gradient_block(4, 1)
_gradient_2x6, _gradient_2x3 = _gradient_block(2, 6), _gradient_block(2, 3)
_gradient_2x2, _gradient_2x1 = _gradient_block(2, 2), _gradient_block(2, 1)
_gradient_1x6, _gradient_1x3 = _gradient_block(1, 6), _gradient_block(1, 3)
_gradient_1x2, _gradient_1x1 = _gradient_block(1, 2), _gradient_block(1, 1)


# ------------------------------------------------------------------------------------------ small intrinsics


@intrinsic
@no_type_check
def _transpose_block(typing_context, inputs, starts, feature, buffer, at, pitch):
    """``buffer[at + j pitch + lane] = inputs[starts[lane] + feature + j]`` for ``LANES`` features ``j``."""

    def generate(context, builder, signature, arguments):
        inputs_v, starts_v, feature, buffer_v, at, pitch = arguments
        inputs_data = _data(context, builder, signature.args[0], inputs_v)
        starts_data = _data(context, builder, signature.args[1], starts_v)
        buffer_data = _data(context, builder, signature.args[3], buffer_v)
        vectors = []
        for lane in range(LANES):
            start = builder.load(builder.gep(starts_data, [ir.Constant(at.type, lane)]))
            vectors.append(_load_vector(builder, inputs_data, builder.add(start, feature)))
        half = LANES // 2
        masks = []
        for first in (0, half):
            lanes = [first + i // 2 + (i % 2) * LANES for i in range(LANES)]
            masks.append(ir.Constant(ir.VectorType(_INT32, LANES), lanes))
        # log2(LANES) perfect shuffles of the rows transpose them.
        for _ in range(LANES.bit_length() - 1):
            vectors = [
                builder.shuffle_vector(vectors[i], vectors[i + half], mask)
                for i in range(half)
                for mask in masks
            ]
        for j, vector in enumerate(vectors):
            index = builder.add(at, builder.mul(pitch, ir.Constant(at.type, j)))
            builder.store(vector, _vector_pointer(builder, buffer_data, index), align=4)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(inputs, starts, intp, buffer, intp, intp), generate


def _dropout_block(*, slope: bool):
    """Intrinsic: dropout of one vector (and, with ``slope``, of the derivatives), as `nets.Dropout` by key."""

    @intrinsic
    @no_type_check
    def block(typing_context, buffer, at, slope_at, index, stride, low, high, threshold, scale):
        def generate(context, builder, signature, arguments):
            buffer_v, at, slope_at, index, stride, low, high, threshold, scale = arguments
            data = _data(context, builder, signature.args[0], buffer_v)
            integers = ir.VectorType(_INT32, LANES)

            def splat(value):
                one = builder.insert_element(
                    ir.Constant(integers, ir.Undefined), value, ir.Constant(_INT32, 0)
                )
                return builder.shuffle_vector(
                    one, ir.Constant(integers, ir.Undefined), ir.Constant(integers, [0] * LANES)
                )

            def shifted(x):
                return builder.xor(x, builder.lshr(x, ir.Constant(integers, [16] * LANES)))

            factor = ir.Constant(integers, [_FACTOR] * LANES)
            lanes = ir.Constant(integers, list(range(LANES)))
            first = splat(builder.trunc(index, _INT32))
            x = builder.add(first, builder.mul(lanes, splat(builder.trunc(stride, _INT32))))
            x = builder.mul(shifted(builder.mul(shifted(x), factor)), factor)
            x = builder.add(builder.mul(shifted(builder.xor(shifted(x), splat(low))), factor), splat(high))
            x = shifted(builder.mul(shifted(x), factor))
            kept = builder.icmp_signed(">=", x, splat(threshold))
            for position in (at, slope_at) if slope else (at,):
                pointer = _vector_pointer(builder, data, position)
                value = builder.fmul(builder.load(pointer, align=4), _splat(builder, scale))
                value = builder.select(kept, value, ir.Constant(_VECTOR, [0.0] * LANES))
                builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        intp, int32 = types.intp, types.int32
        return types.void(buffer, intp, intp, intp, intp, int32, int32, int32, types.float32), generate

    return block


_drop, _drop_with_slope = _dropout_block(slope=False), _dropout_block(slope=True)


@intrinsic
@no_type_check
def _take_ticket(typing_context, counter):
    """The number in ``counter``, which grows by one for the next caller, whichever thread that is."""

    def generate(context, builder, signature, arguments):
        data = _data(context, builder, signature.args[0], arguments[0])
        return builder.atomic_rmw("add", data, ir.Constant(data.type.pointee, 1), "monotonic")

    return types.int64(counter), generate


# ------------------------------------------------------------------------------------- elementary functions


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _exp(x):
    """``exp(x)`` for ``x <= 88``, to 1e-7; NaN stays NaN."""
    clamped = _EXP_LOWEST if x < _EXP_LOWEST else x
    shifted = _multiply_add(clamped, _LOG2_E, _ROUND)
    f = _multiply_add(clamped, _LOG2_E_LOW, _multiply_add(clamped, _LOG2_E, _ROUND - shifted))
    p = _EXP2[3] + f * (_EXP2[4] + f * (_EXP2[5] + f * _EXP2[6]))
    p = _EXP2[0] + f * (_EXP2[1] + f * (_EXP2[2] + f * p))
    return p * _power_of_two(shifted)


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _logistic(x):
    """``1 / (1 + exp(-x))`` and ``1`` minus that, each to 1e-7 relative."""
    e = _exp(-abs(x))
    large = _ONE / (_ONE + e)
    small = e * large
    return (small, large) if x < _ZERO else (large, small)


_LEAK = np.float32(0.01)
# Abramowitz and Stegun 1964, 7.1.26: erfc(x) exp(x^2) to 1.5e-7.
_ERFC_P = np.float32(0.3275911 / math.sqrt(2.0))
_ERFC = tuple(
    np.float32(0.5 * c) for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)
_HALF = np.float32(0.5)
_LOWEST = np.float32(-np.inf)
_NORMAL = np.float32(1.0 / math.sqrt(2.0 * math.pi))


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _gelu(z, slope):
    for i in range(z.size):
        x = z[i]
        u = _exp(-_HALF * (x * x))
        t = _ONE / (_ONE + _ERFC_P * abs(x))
        tail = u * (t * (_ERFC[0] + t * (_ERFC[1] + t * (_ERFC[2] + t * (_ERFC[3] + t * _ERFC[4])))))
        below = tail if x < _ZERO else _ONE - tail
        z[i] = x * below
        slope[i] = below + _NORMAL * (x * u)


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _silu(z, slope):
    for i in range(z.size):
        x = z[i]
        s, rest = _logistic(x)
        h = x * s
        z[i] = h
        slope[i] = s + h * rest


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _sigmoid(z, slope):
    for i in range(z.size):
        s, rest = _logistic(z[i])
        z[i] = s
        slope[i] = s * rest


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _leaky_relu(z, slope):
    for i in range(z.size):
        x = z[i]
        factor = _ONE if x > _ZERO else _LEAK
        z[i] = factor * x
        slope[i] = factor


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _relu(z):
    for i in range(z.size):
        x = z[i]
        z[i] = _ZERO if x < _ZERO else x


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _activate(code, z, slope, frequency, high, low):
    if code == RELU:
        _relu(z)
    elif code == TANH:
        tanh(z, slope)
    elif code == LEAKY_RELU:
        _leaky_relu(z, slope)
    elif code == GELU:
        _gelu(z, slope)
    elif code == SILU:
        _silu(z, slope)
    elif code == SIGMOID:
        _sigmoid(z, slope)
    elif code == SINE:
        sine(z, slope, frequency, high, low)
    else:
        gaussian(z, slope, frequency)


# --------------------------------------------------------------------------------------- operations of a plan


@njit(nogil=True, error_model="numpy")
@no_type_check
def _read_inputs(op, inputs, rows, first, groups, starts, buffer):
    """``INPUT: channels, height, width, at, group pitch, row pitch``; lanes past the batch repeat its last image."""
    channels, height, width, at, group_pitch, row_pitch = op[1], op[2], op[3], op[4], op[5], op[6]
    features = channels * height * width
    pixel_pitch = channels * LANES
    for g in range(groups):
        for lane in range(LANES):
            starts[lane] = rows[min(first + g * LANES + lane, rows.size - 1)] * features
        for c in range(channels):
            for i in range(height):
                feature = (c * height + i) * width
                to = at + g * group_pitch + i * row_pitch + c * LANES
                j = 0
                while j + LANES <= width:
                    _transpose_block(inputs, starts, feature + j, buffer, to + j * pixel_pitch, pixel_pitch)
                    j += LANES
                if j < width and width >= LANES:  # once more, from the right edge
                    j = width - LANES
                    _transpose_block(inputs, starts, feature + j, buffer, to + j * pixel_pitch, pixel_pitch)
                    j = width
                while j < width:
                    for lane in range(LANES):
                        buffer[to + j * pixel_pitch + lane] = inputs[starts[lane] + feature + j]
                    j += 1


@njit(nogil=True, error_model="numpy")
@no_type_check
def _products(op, groups, packed, buffer, table, scale):
    """``PRODUCT: positions, their number, blocks, their number, segments, pitch, run, mode``.

    A block is (rows, offset of its weights, of its biases, of its outputs).
    """
    positions = op[2] * groups
    for b in range(op[4]):
        block = op[3] + 4 * b
        rows, w_at, bias_at, shift = table[block], table[block + 1], table[block + 2], table[block + 3]
        if rows == 8:
            _product_8(
                packed,
                w_at,
                bias_at,
                buffer,
                table,
                op[1],
                positions,
                shift,
                op[5],
                op[6],
                op[7],
                op[8],
                scale,
            )
        elif rows == 4:
            _product_4(
                packed,
                w_at,
                bias_at,
                buffer,
                table,
                op[1],
                positions,
                shift,
                op[5],
                op[6],
                op[7],
                op[8],
                scale,
            )
        elif rows == 2:
            _product_2(
                packed,
                w_at,
                bias_at,
                buffer,
                table,
                op[1],
                positions,
                shift,
                op[5],
                op[6],
                op[7],
                op[8],
                scale,
            )
        else:
            _product_1(
                packed,
                w_at,
                bias_at,
                buffer,
                table,
                op[1],
                positions,
                shift,
                op[5],
                op[6],
                op[7],
                op[8],
                scale,
            )


@njit(nogil=True, error_model="numpy")
@no_type_check
def _gradients(op, groups, buffer, table, g):
    """``GRADIENT: positions, their number, blocks, their number, most positions at a time``.

    A block is (rows, columns, offsets of its deltas, of its inputs, of its sums).
    """
    positions = op[2] * groups
    start = 0
    while start < positions:
        n = min(op[5], positions - start)
        at = op[1] + 3 * start
        for b in range(op[4]):
            block = op[3] + 5 * b
            rows, columns = table[block], table[block + 1]
            d, x, g_at = table[block + 2], table[block + 3], table[block + 4]
            if rows == 4:
                if columns == 6:
                    _gradient_4x6(buffer, table, at, n, d, x, g, g_at)
                elif columns == 3:
                    _gradient_4x3(buffer, table, at, n, d, x, g, g_at)
                elif columns == 2:
                    _gradient_4x2(buffer, table, at, n, d, x, g, g_at)
                else:
                    _gradient_4x1(buffer, table, at, n, d, x, g, g_at)
            elif rows == 2:
                if columns == 6:
                    _gradient_2x6(buffer, table, at, n, d, x, g, g_at)
                elif columns == 3:
                    _gradient_2x3(buffer, table, at, n, d, x, g, g_at)
                elif columns == 2:
                    _gradient_2x2(buffer, table, at, n, d, x, g, g_at)
                else:
                    _gradient_2x1(buffer, table, at, n, d, x, g, g_at)
            elif columns == 6:
                _gradient_1x6(buffer, table, at, n, d, x, g, g_at)
            elif columns == 3:
                _gradient_1x3(buffer, table, at, n, d, x, g, g_at)
            elif columns == 2:
                _gradient_1x2(buffer, table, at, n, d, x, g, g_at)
            else:
                _gradient_1x1(buffer, table, at, n, d, x, g, g_at)
        start += n


@njit(nogil=True, error_model="numpy")
@no_type_check
def _fill(x, at, size, value):
    """As ``x[at : at + size] = value``, which takes numba a second to compile."""
    for i in range(at, at + size):
        x[i] = value


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _lane_sum(x, at):
    """The sum of a vector's lanes, in an order that is fixed."""
    total = _ZERO
    for lane in range(LANES):
        total += x[at + lane]
    return total


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _bias_gradient(op, groups, buffer, table, scratch, g):
    """``BIAS: positions, their number, rows, offset of the sums``."""
    size = op[3] * LANES
    _fill(scratch, 0, size, _ZERO)
    for p in range(op[2] * groups):
        d = table[op[1] + 3 * p + 1]
        for i in range(size):
            scratch[i] += buffer[d + i]
    for r in range(op[3]):
        g[op[4] + r] += _lane_sum(scratch, r * LANES)


@njit(nogil=True, error_model="numpy")
@no_type_check
def _drop_out(op, groups, first, buffer, table, low, high, threshold, scale):
    """``DROP: positions, their number, channels, size of a plane, of an image, whether slopes are stored, place``."""
    channels, plane, image = op[3], op[4], op[5]
    for p in range(op[2] * groups):
        at = op[1] + 3 * p
        h, slope, pixel = table[at], table[at + 1], table[at + 2]
        index = (first + (p // op[2]) * LANES) * image + pixel
        for c in range(channels):
            if op[6]:
                _drop_with_slope(
                    buffer,
                    h + c * LANES,
                    slope + c * LANES,
                    index + c * plane,
                    image,
                    low,
                    high,
                    threshold,
                    scale,
                )
            else:
                _drop(buffer, h + c * LANES, 0, index + c * plane, image, low, high, threshold, scale)


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _pool(op, groups, buffer, table):
    """``POOL_MEAN, POOL_MAX: positions, their number, channels, offset of the result``; the positions' outputs."""
    size = op[3] * LANES
    share = _ONE / np.float32(op[2])
    for g in range(groups):
        out = op[4] + g * size
        if op[0] == POOL_MEAN:
            _fill(buffer, out, size, _ZERO)
            for p in range(op[2]):
                h = table[op[1] + 3 * (g * op[2] + p) + 1]
                for i in range(size):
                    buffer[out + i] += buffer[h + i]
            for i in range(size):
                buffer[out + i] *= share
        else:
            _fill(buffer, out, size, _LOWEST)
            for p in range(op[2]):
                h = table[op[1] + 3 * (g * op[2] + p) + 1]
                for i in range(size):
                    x, largest = buffer[h + i], buffer[out + i]
                    # A NaN is taken, and then kept.
                    buffer[out + i] = largest if (x <= largest or largest != largest) else x


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _finish(mode, buffer, at, aux, size, scale):
    """Turn gradients of activations into those of their arguments."""
    if mode == TIMES_SLOPE:
        for i in range(size):
            buffer[at + i] *= buffer[aux + i]
    elif mode == WHERE_POSITIVE:
        for i in range(size):
            buffer[at + i] = scale * buffer[at + i] if buffer[aux + i] > _ZERO else _ZERO


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _unpool(op, groups, buffer, table, scratch, scale):
    """``UNPOOL_*: positions, their number, channels, offset of the result's gradient, mode, offset of the result``.

    A position is (activation, delta, derivative); ties share a maximum's gradient, as in `torch.amax`.
    """
    size = op[3] * LANES
    share = _ONE / np.float32(op[2])
    for g in range(groups):
        d, best = op[4] + g * size, op[6] + g * size
        if op[0] == UNPOOL_MAX:
            _fill(scratch, 0, size, _ZERO)
            for p in range(op[2]):
                h = table[op[1] + 3 * (g * op[2] + p)]
                for i in range(size):
                    scratch[i] += _ONE if buffer[h + i] == buffer[best + i] else _ZERO
        for p in range(op[2]):
            at = op[1] + 3 * (g * op[2] + p)
            h, delta, aux = table[at], table[at + 1], table[at + 2]
            if op[0] == UNPOOL_MEAN:
                for i in range(size):
                    value = share * buffer[d + i]
                    buffer[delta + i] = buffer[delta + i] + value if op[5] == ACCUMULATE else value
            else:
                for i in range(size):
                    value = buffer[d + i] / scratch[i] if buffer[h + i] == buffer[best + i] else _ZERO
                    buffer[delta + i] = buffer[delta + i] + value if op[5] == ACCUMULATE else value
            _finish(op[5], buffer, delta, aux, size, scale)


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _cross_entropy(op, groups, first, labels, buffer, scratch, train):
    """``LOSS: offset of the logits, classes, offset of the deltas``; the sum over images, and how many are right."""
    classes = op[2]
    share = _ONE / np.float32(labels.size)
    loss, right = 0.0, 0
    for g in range(groups):
        at, delta = op[1] + g * classes * LANES, op[3] + g * classes * LANES
        for lane in range(LANES):
            scratch[lane] = buffer[at + lane]
            scratch[LANES + lane] = _ZERO
        for c in range(1, classes):
            for lane in range(LANES):
                x, m = buffer[at + c * LANES + lane], scratch[lane]
                scratch[lane] = x if x > m else m
        for c in range(classes):
            for lane in range(LANES):
                e = _exp(buffer[at + c * LANES + lane] - scratch[lane])
                scratch[LANES + lane] += e
                buffer[delta + c * LANES + lane] = e
        valid = min(LANES, labels.size - first - g * LANES)
        for lane in range(valid):
            label = labels[first + g * LANES + lane]
            x = buffer[at + label * LANES + lane]
            loss += math.log(np.float64(scratch[LANES + lane])) + (np.float64(scratch[lane]) - np.float64(x))
            if x == scratch[lane]:
                tie = False
                for c in range(label):
                    tie |= buffer[at + c * LANES + lane] == x
                right += 0 if tie else 1
        if train:
            for lane in range(LANES):
                scratch[LANES + lane] = share / scratch[LANES + lane] if lane < valid else _ZERO
            for c in range(classes):
                for lane in range(LANES):
                    buffer[delta + c * LANES + lane] *= scratch[LANES + lane]
            for lane in range(valid):
                label = labels[first + g * LANES + lane]
                buffer[delta + label * LANES + lane] -= share
    return loss, right


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _normalise(op, groups, flat, buffer, table, scratch):
    """``NORM: positions, their number, channels, offsets of weight, bias (in the parameters), of 1 / deviation``.

    A position is (convolution's output and the result, normalised value kept for the gradient, -).
    """
    channels, n = op[3], np.float32(op[2] * op[3])
    for g in range(groups):
        first = op[1] + 3 * g * op[2]
        _fill(scratch, 0, 2 * LANES, _ZERO)
        for p in range(op[2]):
            h = table[first + 3 * p]
            for c in range(channels):
                for lane in range(LANES):
                    scratch[lane] += buffer[h + c * LANES + lane]
        for lane in range(LANES):
            scratch[lane] /= n
        for p in range(op[2]):
            h = table[first + 3 * p]
            for c in range(channels):
                for lane in range(LANES):
                    x = buffer[h + c * LANES + lane] - scratch[lane]
                    scratch[LANES + lane] += x * x
        inverse = op[6] + g * LANES
        for lane in range(LANES):
            buffer[inverse + lane] = _ONE / np.sqrt(scratch[LANES + lane] / n + np.float32(1e-5))
        for p in range(op[2]):
            h, kept = table[first + 3 * p], table[first + 3 * p + 1]
            for c in range(channels):
                weight, bias = flat[op[4] + c], flat[op[5] + c]
                for lane in range(LANES):
                    x = (buffer[h + c * LANES + lane] - scratch[lane]) * buffer[inverse + lane]
                    buffer[kept + c * LANES + lane] = x
                    buffer[h + c * LANES + lane] = weight * x + bias


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _normalise_backward(op, groups, flat, buffer, table, scratch, g_out):
    """``NORM_BACKWARD: as NORM, then offsets of the sums for weight and bias``; positions (delta, normalised, -)."""
    channels, n = op[3], np.float32(op[2] * op[3])
    size = channels * LANES
    by_weight, by_bias = 2 * LANES, 2 * LANES + size
    _fill(scratch, by_weight, 2 * size, _ZERO)
    for g in range(groups):
        first = op[1] + 3 * g * op[2]
        inverse = op[6] + g * LANES
        _fill(scratch, 0, 2 * LANES, _ZERO)
        for p in range(op[2]):
            delta, kept = table[first + 3 * p], table[first + 3 * p + 1]
            for c in range(channels):
                weight = flat[op[4] + c]
                for lane in range(LANES):
                    d, x = buffer[delta + c * LANES + lane], buffer[kept + c * LANES + lane]
                    scratch[by_weight + c * LANES + lane] += d * x
                    scratch[by_bias + c * LANES + lane] += d
                    scratch[lane] += weight * d
                    scratch[LANES + lane] += weight * d * x
        for lane in range(LANES):
            scratch[lane] /= n
            scratch[LANES + lane] /= n
        for p in range(op[2]):
            delta, kept = table[first + 3 * p], table[first + 3 * p + 1]
            for c in range(channels):
                weight = flat[op[4] + c]
                for lane in range(LANES):
                    d, x = buffer[delta + c * LANES + lane], buffer[kept + c * LANES + lane]
                    d = (weight * d - scratch[lane]) - x * scratch[LANES + lane]
                    buffer[delta + c * LANES + lane] = d * buffer[inverse + lane]
    for c in range(channels):
        g_out[op[7] + c] += _lane_sum(scratch, by_weight + c * LANES)
        g_out[op[8] + c] += _lane_sum(scratch, by_bias + c * LANES)


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
@no_type_check
def _elementwise(op, groups, buffer, table, scale):
    """``SLOPE, CLEAR, ADD: positions, their number, channels, mode``; positions (target, source, -)."""
    size = op[3] * LANES
    for p in range(op[2] * groups):
        at, aux = table[op[1] + 3 * p], table[op[1] + 3 * p + 1]
        if op[0] == CLEAR:
            _fill(buffer, at, size, _ZERO)
        elif op[0] == ADD:
            for i in range(size):
                buffer[at + i] += buffer[aux + i]
        else:
            _finish(op[4], buffer, at, aux, size, scale)


# ----------------------------------------------------------------------------------------------- the networks


@njit(nogil=True, cache=True, error_model="numpy")
@no_type_check
def run_networks(
    weights,
    inputs,
    rows,
    labels,
    plan,
    forward,
    table,
    pack,
    unpack,
    sizes,
    w0,
    drop_keys,
    thresholds,
    scales,
    counter,
    losses,
    right,
    gradients,
):
    """Losses, and gradients if asked for, of the networks whose tickets this thread draws.

    Args:
        weights: (networks, parameters) float32.
        inputs: (items * features,) float32.
        rows: (networks or 1, batch) int64, numbers of items; one row: the same for all networks.
        labels: like ``rows``.
        plan: (operations, `FIELDS`) int64.
        forward: how many operations of the plan end with the loss; with ``gradients`` empty, only these run.
        table: int64, what the plan points into.
        pack: int64, for each weight in the kernel's order its number in the parameters; -1 for a zero.
        unpack: (parameters,) int64, where each one's gradient is among the kernel's sums.
        sizes: (4,) int64: of the activations' memory, of the sums, of the scratch; most groups in a tile.
        w0: of sine and Gaussian.
        drop_keys: (networks, layers, 2) int32, the halves of each layer's key; no layers: no dropout.
        thresholds: (networks,) int32, of the random words that stay.
        scales: (networks,) float32, of what stays.
        counter: (1,) int64, the next network; shared by the threads.
        losses: (networks,) float64, out: mean cross entropy.
        right: (networks,) int64, out: number of correct answers.
        gradients: (networks, parameters) float32, out; (0, parameters): none.
    """
    networks, batch = weights.shape[0], rows.shape[1]
    train = gradients.shape[0] > 0
    operations = plan.shape[0] if train else forward
    most_groups = sizes[3]
    frequency = np.float32(w0)
    high = np.float32(w0 / math.pi)
    low = np.float32(w0 / math.pi - np.float64(high))

    storage = np.zeros(sizes[0] + 16, np.float32)
    # A vector load that straddles two cache lines costs double.
    align = (-(storage.ctypes.data >> 2)) & 15
    buffer = storage[align : align + sizes[0]]
    packed = np.zeros(pack.size, np.float32)
    g = np.zeros(sizes[1], np.float32)
    scratch = np.zeros(sizes[2], np.float32)
    starts = np.zeros(LANES, np.int64)

    while True:
        network = _take_ticket(counter)
        if network >= networks:
            break
        flat = weights[network]
        for i in range(pack.size):
            packed[i] = flat[pack[i]] if pack[i] >= 0 else _ZERO
        _fill(g, 0, g.size, _ZERO)
        scale = scales[network]
        dropping = drop_keys.shape[1] > 0 and thresholds[network] != KEEP_ALL
        row = network if rows.shape[0] > 1 else 0
        loss, correct = 0.0, 0
        first = 0
        while first < batch:
            groups = min(most_groups, (batch - first + LANES - 1) // LANES)
            for o in range(operations):
                op = plan[o]
                code = op[0]
                if code == PRODUCT:
                    _products(op, groups, packed, buffer, table, scale)
                elif code == GRADIENT:
                    _gradients(op, groups, buffer, table, g)
                elif code == BIAS:
                    _bias_gradient(op, groups, buffer, table, scratch, g)
                elif code == INPUT:
                    _read_inputs(op, inputs, rows[row], first, groups, starts, buffer)
                elif code == ACTIVATE:
                    for p in range(op[2] * groups):
                        at, slope = table[op[1] + 3 * p], table[op[1] + 3 * p + 1]
                        _activate(
                            op[4],
                            buffer[at : at + op[3]],
                            buffer[slope : slope + op[3]],
                            frequency,
                            high,
                            low,
                        )
                elif code == DROP:
                    if dropping:
                        _drop_out(
                            op,
                            groups,
                            first,
                            buffer,
                            table,
                            drop_keys[network, op[7], 0],
                            drop_keys[network, op[7], 1],
                            thresholds[network],
                            scale,
                        )
                elif code == LOSS:
                    part, number = _cross_entropy(op, groups, first, labels[row], buffer, scratch, train)
                    loss += part
                    correct += number
                elif code in (POOL_MEAN, POOL_MAX):
                    _pool(op, groups, buffer, table)
                elif code in (UNPOOL_MEAN, UNPOOL_MAX):
                    _unpool(op, groups, buffer, table, scratch, scale)
                elif code == NORM:
                    _normalise(op, groups, flat, buffer, table, scratch)
                elif code == NORM_BACKWARD:
                    _normalise_backward(op, groups, flat, buffer, table, scratch, g)
                else:
                    _elementwise(op, groups, buffer, table, scale)
            first += groups * LANES
        losses[network] = loss / batch
        right[network] = correct
        if train:
            gradient = gradients[network]
            for i in range(unpack.size):
                gradient[i] = g[unpack[i]]
