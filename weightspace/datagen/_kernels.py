"""One coordinate MLP, trained from start to end inside one compiled call.

A tile of points goes through the whole network and back before the next tile is touched, so the activations
never leave the caches. Everything is *feature-major*, ``(units, tile)``: the points of the tile are the SIMD
axis, whatever the widths. The two matrix products are register-blocked in LLVM IR with explicit vectors,
because the loop vectoriser finds neither block by itself; every element-wise loop is plain Python.

Inside the kernel the parameters of layer ``l`` are one matrix ``(out, in + 1)`` whose last column is the
bias, and every activation matrix carries a last row of ones, so that a bias gradient is one more column of
the weight gradient. A transposed copy ``(in + 1, out)`` serves the forward pass: both passes then read the
weights of one register block from consecutive addresses.
"""

from __future__ import annotations

import math

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SINE, RELU, TANH, GAUSSIAN = 0, 1, 2, 3


def _host_lanes() -> int:
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx") else 4


LANES = _host_lanes()
# 8 x 2 accumulators need 32 vector registers (AVX-512, NEON); with the 16 of AVX2 they would spill.
_ROWS = 4 if LANES == 8 else 8

# `contract` gives fused multiply-adds. Neither set holds `nnan` or `ninf`: a diverged network must be seen.
# `reassoc` is kept away from the polynomials, whose range reduction it would fold away, and from Adam.
_EXACT = {"contract", "nsz"}
_SUMS = {"contract", "nsz", "reassoc"}


# ---------------------------------------------------------------------------------- register-blocked products

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT32 = ir.IntType(32)


def _data(context, builder, array_type, value):
    return context.make_array(array_type)(context, builder, value).data


def _fma(builder, a, b, c):
    signature = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [a, b, c])


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(_INT32, 0))
    mask = ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), mask)


def _load_vector(builder, data, index):
    return builder.load(_vector_pointer(builder, data, index), align=4)


def _vector_pointer(builder, data, index):
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _counted_loop(builder, count, step, initial, body):
    """Emit ``for k in range(0, count, step)`` (at least one turn); ``body`` maps the carried vectors."""
    intp = count.type
    before = builder.basic_block
    block = builder.append_basic_block("product")
    after = builder.append_basic_block("product.end")
    builder.branch(block)
    builder.position_at_end(block)
    k = builder.phi(intp)
    k.add_incoming(ir.Constant(intp, 0), before)
    carried = []
    for value in initial:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        carried.append(phi)
    results = body(k, carried)
    following = builder.add(k, ir.Constant(intp, step))
    end = builder.basic_block
    k.add_incoming(following, end)
    for phi, value in zip(carried, results, strict=True):
        phi.add_incoming(value, end)
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return results


def _product_block(rows: int, vectors: int, *, backward: bool):
    """Intrinsic for ``rows`` x ``vectors`` register tiles of ``W x`` (plus bias) or of ``(W^T d) * a'``.

    ``w[w_at + k * w_pitch + r]`` is the weight of block row ``r`` and summed row ``k``. Forward, the row
    after the last summed one is the bias. Backward, the result multiplies what ``out`` held: the derivative
    of the activation.
    """

    @intrinsic
    def block(typing_context, w, w_at, w_pitch, x, x_at, pitch, depth, out, out_at):
        def generate(context, builder, signature, arguments):
            w_v, w_at, w_pitch, x_v, x_at, pitch, depth, out_v, out_at = arguments
            w_data = _data(context, builder, signature.args[0], w_v)
            x_data = _data(context, builder, signature.args[3], x_v)
            out_data = _data(context, builder, signature.args[7], out_v)
            intp = depth.type

            def weights(k):
                base = builder.add(w_at, builder.mul(k, w_pitch))
                for r in range(rows):
                    index = builder.add(base, ir.Constant(intp, r))
                    yield _splat(builder, builder.load(builder.gep(w_data, [index])))

            def body(k, carried):
                base = builder.add(x_at, builder.mul(k, pitch))
                columns = [
                    _load_vector(builder, x_data, builder.add(base, ir.Constant(intp, v * LANES)))
                    for v in range(vectors)
                ]
                results = []
                for r, weight in enumerate(weights(k)):
                    for v in range(vectors):
                        results.append(_fma(builder, weight, columns[v], carried[r * vectors + v]))
                return results

            if backward:
                initial = [ir.Constant(_VECTOR, [0.0] * LANES)] * (rows * vectors)
            else:
                initial = [bias for bias in weights(depth) for _ in range(vectors)]
            sums = _counted_loop(builder, depth, 1, initial, body)
            for r in range(rows):
                row_at = builder.add(out_at, builder.mul(pitch, ir.Constant(intp, r)))
                for v in range(vectors):
                    index = builder.add(row_at, ir.Constant(intp, v * LANES))
                    value = sums[r * vectors + v]
                    pointer = _vector_pointer(builder, out_data, index)
                    if backward:
                        value = builder.fmul(value, builder.load(pointer, align=4))
                    builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(
            w, types.intp, types.intp, x, types.intp, types.intp, types.intp, out, types.intp
        ), generate

    return block


def _pairwise(builder, a, b, granule: int):
    """Add neighbouring granules of ``a`` and of ``b``: half the partial sums, both vectors in one."""
    span = 4 if granule == 1 else LANES  # single lanes are paired within 128 bits: those shuffles are cheap
    masks: list[list[int]] = [[], []]
    for start in range(0, LANES, span):
        for source in (0, LANES):
            for at in range(start, start + span, 2 * granule):
                for which in (0, 1):
                    masks[which] += [source + at + which * granule + j for j in range(granule)]
    halves = [builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, LANES), mask)) for mask in masks]
    return builder.fadd(*halves)


def _sums_of(builder, vectors):
    """The horizontal sums of ``LANES`` vectors as the lanes of one vector, in order."""
    for granule in (1, 1, 4, 4)[: int(math.log2(LANES))]:
        vectors = [_pairwise(builder, vectors[i], vectors[i + 1], granule) for i in range(0, len(vectors), 2)]
    return vectors[0]


def _gradient_block(rows: int, columns: int):
    """Intrinsic for ``g[r, c] += sum_t d[r, t] h[c, t]`` on a block of ``rows`` x ``columns``."""

    @intrinsic
    def block(typing_context, d, d_at, h, h_at, pitch, g, g_at, g_pitch):
        def generate(context, builder, signature, arguments):
            d_v, d_at, h_v, h_at, pitch, g_v, g_at, g_pitch = arguments
            d_data = _data(context, builder, signature.args[0], d_v)
            h_data = _data(context, builder, signature.args[2], h_v)
            g_data = _data(context, builder, signature.args[5], g_v)
            intp = pitch.type

            def load_rows(data, at, t, count):
                base = builder.add(at, t)
                return [
                    _load_vector(builder, data, builder.add(base, builder.mul(pitch, ir.Constant(intp, r))))
                    for r in range(count)
                ]

            def body(t, carried):
                left = load_rows(d_data, d_at, t, rows)
                right = load_rows(h_data, h_at, t, columns)
                return [
                    _fma(builder, left[r], right[c], carried[r * columns + c])
                    for r in range(rows)
                    for c in range(columns)
                ]

            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            sums = _counted_loop(builder, pitch, LANES, [zero] * (rows * columns), body)
            sums += [zero] * (-len(sums) % LANES)
            lanes = []
            for i in range(0, len(sums), LANES):
                total = _sums_of(builder, sums[i : i + LANES])
                lanes += [(total, j) for j in range(LANES)]
            for r in range(rows):
                row_at = builder.add(g_at, builder.mul(g_pitch, ir.Constant(intp, r)))
                for c in range(0, columns, 4):
                    width = min(4, columns - c)
                    total, first = lanes[r * columns + c]
                    mask = ir.Constant(ir.VectorType(_INT32, width), list(range(first, first + width)))
                    part = builder.shuffle_vector(total, ir.Constant(_VECTOR, ir.Undefined), mask)
                    pointer = builder.gep(g_data, [builder.add(row_at, ir.Constant(intp, c))])
                    pointer = builder.bitcast(pointer, part.type.as_pointer())
                    builder.store(builder.fadd(builder.load(pointer, align=4), part), pointer, align=4)
            return context.get_dummy_value()

        return types.void(d, types.intp, h, types.intp, types.intp, g, types.intp, types.intp), generate

    return block


_forward_wide = _product_block(_ROWS, 2, backward=False)
_forward_narrow = _product_block(_ROWS, 1, backward=False)
_forward_row_wide = _product_block(1, 2, backward=False)
_forward_row = _product_block(1, 1, backward=False)
_backward_wide = _product_block(_ROWS, 2, backward=True)
_backward_narrow = _product_block(_ROWS, 1, backward=True)
_backward_row_wide = _product_block(1, 2, backward=True)
_backward_row = _product_block(1, 1, backward=True)
_gradient_4x4 = _gradient_block(4, 4)
_gradient_4x1 = _gradient_block(4, 1)
_gradient_1x4 = _gradient_block(1, 4)
_gradient_1x1 = _gradient_block(1, 1)


@njit(nogil=True, error_model="numpy")
def _forward_product(w, w_at, rows, depth, buffer, x_at, out_at, tile):
    """``out = W x + bias`` for one layer and one tile; ``w`` is transposed, ``(depth + 1, rows)``."""
    row = 0
    while row + _ROWS <= rows:
        t = 0
        while t + 2 * LANES <= tile:
            _forward_wide(w, w_at + row, rows, buffer, x_at + t, tile, depth, buffer, out_at + row * tile + t)
            t += 2 * LANES
        if t < tile:
            _forward_narrow(
                w, w_at + row, rows, buffer, x_at + t, tile, depth, buffer, out_at + row * tile + t
            )
        row += _ROWS
    while row < rows:
        t = 0
        while t + 2 * LANES <= tile:
            _forward_row_wide(
                w, w_at + row, rows, buffer, x_at + t, tile, depth, buffer, out_at + row * tile + t
            )
            t += 2 * LANES
        if t < tile:
            _forward_row(w, w_at + row, rows, buffer, x_at + t, tile, depth, buffer, out_at + row * tile + t)
        row += 1


@njit(nogil=True, error_model="numpy")
def _backward_product(w, w_at, rows, depth, buffer, d_at, out_at, tile):
    """``out *= W^T d`` for one layer and one tile; ``w`` is ``(depth, rows + 1)``, its last column unused."""
    row = 0
    while row + _ROWS <= rows:
        t = 0
        while t + 2 * LANES <= tile:
            _backward_wide(
                w, w_at + row, rows + 1, buffer, d_at + t, tile, depth, buffer, out_at + row * tile + t
            )
            t += 2 * LANES
        if t < tile:
            _backward_narrow(
                w, w_at + row, rows + 1, buffer, d_at + t, tile, depth, buffer, out_at + row * tile + t
            )
        row += _ROWS
    while row < rows:
        t = 0
        while t + 2 * LANES <= tile:
            _backward_row_wide(
                w, w_at + row, rows + 1, buffer, d_at + t, tile, depth, buffer, out_at + row * tile + t
            )
            t += 2 * LANES
        if t < tile:
            _backward_row(
                w, w_at + row, rows + 1, buffer, d_at + t, tile, depth, buffer, out_at + row * tile + t
            )
        row += 1


@njit(nogil=True, error_model="numpy")
def _add_gradient(g, g_at, rows, columns, buffer, d_at, h_at, tile):
    """``g += d h^T`` for one layer and one tile; the last of the ``columns`` is the bias."""
    row = 0
    while row + 4 <= rows:
        column = 0
        while column + 4 <= columns:
            at = g_at + row * columns + column
            _gradient_4x4(buffer, d_at + row * tile, buffer, h_at + column * tile, tile, g, at, columns)
            column += 4
        while column < columns:
            at = g_at + row * columns + column
            _gradient_4x1(buffer, d_at + row * tile, buffer, h_at + column * tile, tile, g, at, columns)
            column += 1
        row += 4
    while row < rows:
        column = 0
        while column + 4 <= columns:
            at = g_at + row * columns + column
            _gradient_1x4(buffer, d_at + row * tile, buffer, h_at + column * tile, tile, g, at, columns)
            column += 4
        while column < columns:
            at = g_at + row * columns + column
            _gradient_1x1(buffer, d_at + row * tile, buffer, h_at + column * tile, tile, g, at, columns)
            column += 1
        row += 1


# ------------------------------------------------------------------------------------- elementary functions


@intrinsic
def _multiply_add(typing_context, a, b, c):
    """``a b + c``, rounded once. Left to itself, LLVM would not fuse a product that has two uses."""

    def generate(context, builder, signature, arguments):
        signature = ir.FunctionType(_FLOAT, [_FLOAT] * 3)
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.fmuladd.f32")
        return builder.call(function, arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def _flip_sign_if_odd(typing_context, value, shifted):
    """``value`` with its sign flipped if the integer held by ``shifted`` (see `_ROUND`) is odd."""

    def generate(context, builder, signature, arguments):
        value, shifted = (builder.bitcast(x, _INT32) for x in arguments)
        sign = builder.shl(shifted, ir.Constant(_INT32, 31))
        return builder.bitcast(builder.xor(value, sign), _FLOAT)

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _power_of_two(typing_context, shifted):
    """``2**n`` for the integer ``n`` in [-126, 127] held by ``shifted`` (see `_ROUND`)."""

    def generate(context, builder, signature, arguments):
        bits = builder.add(builder.bitcast(arguments[0], _INT32), ir.Constant(_INT32, 127))
        return builder.bitcast(builder.shl(bits, ir.Constant(_INT32, 23)), _FLOAT)

    return types.float32(types.float32), generate


# Adding 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer and leaves it in the low bits.
_ROUND = np.float32(12582912.0)

# Minimax (Lawson-weighted least squares): sin(pi f) to 6e-9 relative, cos(pi f) to 5e-8 absolute, and 2**f
# to 2e-9 relative, each for |f| <= 1/2.
_SIN = tuple(np.float32(c) for c in (3.14159265, -5.16770969, 2.55006973, -0.598242162, 0.0775604452))
_COS = tuple(np.float32(c) for c in (0.999999953, -4.93479286, 4.05841193, -1.33188027, 0.219696992))
_EXP2 = tuple(
    np.float32(c)
    for c in (1.0, 0.693147206, 0.240226469, 0.0555032878, 0.00961848896, 0.00133999312, 0.000153458119)
)
# The rational tanh of Eigen: odd over even, within 4 ulp; beyond the limit float32 tanh is 1.
_TANH_LIMIT = np.float32(7.90531110763549805)
_TANH_ODD = tuple(
    np.float32(c)
    for c in (
        4.89352455891786e-03,
        6.37261928875436e-04,
        1.48572235717979e-05,
        5.12229709037114e-08,
        -8.60467152213735e-11,
        2.00018790482477e-13,
        -2.76076847742355e-16,
    )
)
_TANH_EVEN = tuple(
    np.float32(c)
    for c in (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_ZERO = np.float32(0.0)
_LOG2_E = np.float32(1.4426950408889634)
_LOG2_E_LOW = np.float32(1.4426950408889634 - float(_LOG2_E))
_EXP_LOWEST = np.float32(-87.0)


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
def sine(z, slope, frequency, high, low):
    """Put ``sin(frequency z)`` in the place of ``z``, and ``frequency cos(frequency z)`` in ``slope``.

    ``high + low`` is ``frequency / pi`` as two float32. Accurate to float32 while ``|frequency z| < 1e7``.
    """
    # The factor goes into the coefficients: one multiplication fewer for each element.
    c0, c1, c2 = frequency * _COS[0], frequency * _COS[1], frequency * _COS[2]
    c3, c4 = frequency * _COS[3], frequency * _COS[4]
    for i in range(z.size):
        x = z[i]
        shifted = _multiply_add(x, high, _ROUND)
        f = _multiply_add(x, low, _multiply_add(x, high, _ROUND - shifted))
        g = f * f
        s = f * (_SIN[0] + g * (_SIN[1] + g * (_SIN[2] + g * (_SIN[3] + g * _SIN[4]))))
        c = c0 + g * (c1 + g * (c2 + g * (c3 + g * c4)))
        z[i] = _flip_sign_if_odd(s, shifted)
        slope[i] = _flip_sign_if_odd(c, shifted)


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
def relu(z, slope):
    """Put ``max(0, z)`` in the place of ``z``, and ``[z > 0]`` in ``slope``; NaN stays NaN."""
    for i in range(z.size):
        x = z[i]
        slope[i] = _ONE if x > _ZERO else _ZERO
        z[i] = _ZERO if x < _ZERO else x


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
def tanh(z, slope):
    """Put the hyperbolic tangent of ``z`` in its place, and its derivative in ``slope``."""
    for i in range(z.size):
        x = z[i]
        # Comparisons in this direction let a NaN through.
        x = _TANH_LIMIT if x > _TANH_LIMIT else x
        x = -_TANH_LIMIT if x < -_TANH_LIMIT else x
        g = x * x
        p = _TANH_ODD[5] + g * _TANH_ODD[6]
        p = _TANH_ODD[2] + g * (_TANH_ODD[3] + g * (_TANH_ODD[4] + g * p))
        p = x * (_TANH_ODD[0] + g * (_TANH_ODD[1] + g * p))
        q = _TANH_EVEN[0] + g * (_TANH_EVEN[1] + g * (_TANH_EVEN[2] + g * _TANH_EVEN[3]))
        h = p / q
        z[i] = h
        slope[i] = _ONE - h * h


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
def gaussian(z, slope, frequency):
    """Put ``exp(-(frequency z)**2)`` in the place of ``z``, and its derivative in ``slope``."""
    for i in range(z.size):
        u = frequency * z[i]
        x = -(u * u)
        clamped = _EXP_LOWEST if x < _EXP_LOWEST else x
        shifted = _multiply_add(clamped, _LOG2_E, _ROUND)
        f = _multiply_add(clamped, _LOG2_E_LOW, _multiply_add(clamped, _LOG2_E, _ROUND - shifted))
        p = _EXP2[3] + f * (_EXP2[4] + f * (_EXP2[5] + f * _EXP2[6]))
        p = _EXP2[0] + f * (_EXP2[1] + f * (_EXP2[2] + f * p))
        h = p * _power_of_two(shifted)
        # The derivative grows with u: what the clamp leaves of exp must not meet a huge u.
        h = _ZERO if x < _EXP_LOWEST else h
        z[i] = h
        slope[i] = -_TWO * frequency * u * h


# ---------------------------------------------------------------------------------------------- one network


@njit(nogil=True, error_model="numpy", fastmath=_EXACT)
def _adam(w, m, v, g, learning_rate, step):
    """One update as in `torch.optim.Adam` with its default betas and eps; clears the gradient."""
    scale = np.float32(learning_rate / (1.0 - 0.9**step))
    root = np.float32(math.sqrt(1.0 - 0.999**step))
    beta1, rest1 = np.float32(0.9), np.float32(0.1)
    beta2, rest2 = np.float32(0.999), np.float32(0.001)
    epsilon = np.float32(1e-8)
    for i in range(w.size):
        x = g[i]
        first = beta1 * m[i] + rest1 * x
        second = beta2 * v[i] + rest2 * (x * x)
        m[i] = first
        v[i] = second
        w[i] -= scale * first / (np.sqrt(second) / root + epsilon)
        g[i] = _ZERO


@njit(nogil=True, error_model="numpy", fastmath=_SUMS)
def _output_error(out, targets, valid, offset, factor):
    """Turn one row of outputs into ``dL/d out``; return the sum of squared errors."""
    total = _ZERO
    for t in range(valid):
        error = (out[t] + offset) - targets[t]
        total += error * error
        out[t] = factor * error
    for t in range(valid, out.size):
        out[t] = _ZERO
    return total


@njit(nogil=True, error_model="numpy")
def _copy_parameters(flat, packed, widths, inwards):
    """Between the flat order (each weight, then its bias) and the packed ``(out, in + 1)`` matrices."""
    at = 0
    for layer in range(widths.size - 1):
        n_in, n_out = widths[layer], widths[layer + 1]
        bias_at = at + n_out * n_in
        for o in range(n_out):
            for i in range(n_in + 1):
                source = at + o * n_in + i if i < n_in else bias_at + o
                if inwards:
                    packed[at + o * (n_in + 1) + i] = flat[source]
                else:
                    flat[source] = packed[at + o * (n_in + 1) + i]
        at += n_out * (n_in + 1)


@njit(nogil=True, error_model="numpy")
def _transpose_parameters(packed, transposed, widths):
    at = 0
    for layer in range(widths.size - 1):
        columns, rows = widths[layer] + 1, widths[layer + 1]
        for o in range(rows):
            for i in range(columns):
                transposed[at + i * rows + o] = packed[at + o * columns + i]
        at += rows * columns


@njit(nogil=True, cache=True, error_model="numpy")
def train_network(
    flat, widths, activation, w0, offset, coordinates, targets, tile, learning_rate, steps, target_psnr, stop
):
    """Fit one network in place.

    Args:
        flat: (P,) float32, the initial parameters; overwritten by the fitted ones.
        widths: (layers + 1,) int64.
        activation: one of `SINE`, `RELU`, `TANH`, `GAUSSIAN`.
        w0: float64, the frequency of every hidden layer.
        offset: float32, added to the output.
        coordinates: (in_features, points) float32.
        targets: (out_features, points) float32.
        tile: points per tile, a multiple of 16.
        learning_rate: float64.
        steps: the most updates to make.
        target_psnr: stop at this PSNR in dB; NaN: never.
        stop: (1,) int32, polled before each step; not zero: give up.

    Returns:
        PSNR in dB of exactly these parameters (NaN if the loss is not finite or the fit was given up) and the
        number of updates made.
    """
    layers = widths.size - 1
    points = coordinates.shape[1]
    outputs = widths[layers]
    tiles = (points + tile - 1) // tile
    frequency = np.float32(w0)
    high = np.float32(w0 / math.pi)
    low = np.float32(w0 / math.pi - np.float64(high))

    # Where each layer's parameters, inputs (with their row of ones) and slopes begin. The slopes of a layer
    # become its deltas in the backward pass. The last entry of `slope_at` holds the outputs, then the errors.
    w_at = np.zeros(layers + 1, np.int64)
    h_at = np.zeros(layers + 1, np.int64)
    slope_at = np.zeros(layers + 1, np.int64)
    size = 0
    for layer in range(layers):
        w_at[layer + 1] = w_at[layer] + widths[layer + 1] * (widths[layer] + 1)
        h_at[layer] = size
        size += (widths[layer] + 1) * tile
        slope_at[layer + 1] = size
        size += widths[layer + 1] * tile
    storage = np.zeros(size + 16, np.float32)
    # A vector load that straddles two cache lines costs double, so every row starts on a line.
    shift = (-(storage.ctypes.data >> 2)) & 15
    buffer = storage[shift : shift + size]
    for layer in range(layers):
        row = h_at[layer] + widths[layer] * tile
        buffer[row : row + tile] = _ONE

    total_parameters = w_at[layers]
    packed = np.empty(total_parameters, np.float32)
    transposed = np.empty(total_parameters, np.float32)
    m = np.zeros(total_parameters, np.float32)
    v = np.zeros(total_parameters, np.float32)
    g = np.zeros(total_parameters, np.float32)
    _copy_parameters(flat, packed, widths, True)
    _transpose_parameters(packed, transposed, widths)

    psnr = np.nan
    step = 0
    while stop[0] == 0:
        loss = 0.0
        last = step >= steps
        for index in range(tiles):
            start = index * tile
            valid = min(tile, points - start)
            for i in range(widths[0]):
                row = h_at[0] + i * tile
                buffer[row : row + valid] = coordinates[i, start : start + valid]
                # Stale columns are harmless (their error is zero) but must be finite.
                buffer[row + valid : row + tile] = _ZERO
            for layer in range(layers - 1):
                n_in, n_out = widths[layer], widths[layer + 1]
                z_at, a_at = h_at[layer + 1], slope_at[layer + 1]
                _forward_product(transposed, w_at[layer], n_out, n_in, buffer, h_at[layer], z_at, tile)
                z = buffer[z_at : z_at + n_out * tile]
                slope = buffer[a_at : a_at + n_out * tile]
                if activation == SINE:
                    sine(z, slope, frequency, high, low)
                elif activation == RELU:
                    relu(z, slope)
                elif activation == TANH:
                    tanh(z, slope)
                else:
                    gaussian(z, slope, frequency)
            e_at = slope_at[layers]
            _forward_product(
                transposed,
                w_at[layers - 1],
                outputs,
                widths[layers - 1],
                buffer,
                h_at[layers - 1],
                e_at,
                tile,
            )
            factor = np.float32(2.0 / (points * outputs))
            for o in range(outputs):
                out = buffer[e_at + o * tile : e_at + (o + 1) * tile]
                # float32 within a row of a tile, float64 across: no loss of precision with many points.
                loss += _output_error(out, targets[o, start : start + valid], valid, offset, factor)
            if last:
                continue
            for layer in range(layers - 1, -1, -1):
                n_in, n_out = widths[layer], widths[layer + 1]
                d_at = slope_at[layer + 1]
                _add_gradient(g, w_at[layer], n_out, n_in + 1, buffer, d_at, h_at[layer], tile)
                if layer > 0:
                    _backward_product(packed, w_at[layer], n_in, n_out, buffer, d_at, slope_at[layer], tile)
        loss /= points * outputs
        if not math.isfinite(loss):
            psnr = np.nan
            break
        psnr = -10.0 * math.log10(loss) if loss > 0.0 else np.inf
        if last or psnr >= target_psnr:
            break
        step += 1
        _adam(packed, m, v, g, learning_rate, step)
        _transpose_parameters(packed, transposed, widths)
    else:
        psnr = np.nan
    _copy_parameters(flat, packed, widths, False)
    return psnr, step
