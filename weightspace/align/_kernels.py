"""Assignments, and the whole of weight matching for small networks, in compiled code: one pair per thread.

The assignment is that of Jonker and Volgenant (1987): shortest augmenting paths over reduced costs. Where a
textbook walks a list of open columns, these loops pass over all columns without a branch, which the compiler turns
into vectors: for 32 units 7 to 13 microseconds, where SciPy takes 27 to 42. Reduced costs are never negative, so
their bits as whole numbers have the same order, and the least of whole numbers is found in vectors as well.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# columns of the table of groups
SIZE, UNITS, FIRST, LAST, PERMUTED, SIGNED, PHASED, SHIFTED = range(8)
# columns of the table of places
OFFSET, STRIDE, REST, COUNT, KIND, SETTLED = range(6)
KINDS = 4

_OPTIONS = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
    "boundscheck": False,
}
_SUMS = {**_OPTIONS, "fastmath": {"contract", "reassoc"}}
_INFINITE = np.int64(0x7FF0000000000000)  # the bits of infinity


@intrinsic
def _take_ticket(typing_context, counter):
    """The number in ``counter``, which grows by one for the next caller, whichever thread that is."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(data.type.pointee, 1), "monotonic")

    return types.int64(counter), generate


@njit(**_OPTIONS)
def _copy(values, out):
    """A loop: what numba makes of ``out[:] = values`` takes seconds to compile."""
    for at in range(values.size):
        out[at] = values[at]


@njit(**_OPTIONS)
def _fill(values, value):
    for at in range(values.size):
        values[at] = value


# ----------------------------------------------------------------------------------------------- assignment


@njit(**_OPTIONS)
def _reduce_row(row, v, keys):
    """Reduced costs of one row; the cost is the negative score."""
    for j in range(keys.size):
        r = -row[j] - v[j]
        keys[j] = r if r > 0.0 else 0.0


@njit(**_OPTIONS)
def _extend(row, base, open_v, keys, before, i):
    """Paths that pass through row ``i``: a settled column has ``open_v`` -infinity and stays as it is."""
    for j in range(keys.size):
        r = base - row[j] - open_v[j]
        r = r if r > 0.0 else 0.0
        shorter = r < keys[j]
        keys[j] = r if shorter else keys[j]
        before[j] = i if shorter else before[j]


@njit(**_OPTIONS)
def _nearest(bits, rank):
    """The rank of a column with the least key, of one that nobody owns if there is one: those are negative."""
    low = _INFINITE
    for j in range(bits.size):
        low = min(low, bits[j])
    found = bits.size
    for j in range(bits.size):
        found = min(found, rank[j] if bits[j] == low else bits.size)
    return found


@njit(**_OPTIONS)
def assign(score, source, numbers, whole):
    """For every place the unit that goes there, such that the sum of scores is largest.

    Args:
        score: (size, size), finite.
        source: (size,) int64, out.
        numbers: (4, size) float64, workspace.
        whole: (5, size) int64, workspace.
    """
    n = score.shape[0]
    v, keys, open_v, depth = numbers[0], numbers[1], numbers[2], numbers[3]
    owner, before, rank, waiting, settled = whole[0], whole[1], whole[2], whole[3], whole[4]
    bits = keys.view(np.int64)
    for j in range(n):
        v[j] = np.inf
        owner[j] = -1
        rank[j] = j - n
    for i in range(n):
        row = score[i]
        for j in range(n):
            v[j] = -row[j] if -row[j] < v[j] else v[j]

    free = 0
    for i in range(n):
        source[i] = -1
        _reduce_row(score[i], v, keys)
        at = _nearest(bits, rank)
        # on ties every unit stays where it is
        at = i - n if owner[i] < 0 and keys[i] == keys[at] else at
        if at < 0:
            at += n
            source[i] = at
            owner[at] = i
            rank[at] = at
        else:
            waiting[free] = i
            free += 1

    for k in range(free):
        i = waiting[k]
        for j in range(n):
            keys[j] = np.inf
            open_v[j] = v[j]
        base = 0.0
        seen = 0
        while True:
            _extend(score[i], base, open_v, keys, before, i)
            at = _nearest(bits, rank)
            if at < 0:
                break
            base = keys[at]
            settled[seen] = at
            depth[seen] = base
            seen += 1
            open_v[at] = -np.inf
            keys[at] = np.inf
            i = owner[at]
            base += score[i, at] + v[at]
        at += n
        for s in range(seen):
            v[settled[s]] += depth[s] - keys[at]
        rank[at] = at
        while at >= 0:
            i = before[at]
            owner[at] = i
            following = source[i]
            source[i] = at
            at = following


@njit(**_OPTIONS)
def assign_all(scores, sources, counter):
    """The assignments of the matrices whose tickets this thread draws.

    Args:
        scores: (matrices, size, size), finite.
        sources: (matrices, size) int64, out.
        counter: (1,) int64, the next matrix; shared by the threads.
    """
    n = scores.shape[1]
    numbers, whole = np.empty((4, n), np.float64), np.empty((5, n), np.int64)
    while True:
        matrix = _take_ticket(counter)
        if matrix >= scores.shape[0]:
            break
        assign(scores[matrix], sources[matrix], numbers, whole)


# -------------------------------------------------------------------------------- one group of one pair


@njit(**_OPTIONS)
def _factor(kind, sign, parity):
    """What a sign and the parity of a phase's steps multiply places of a kind by."""
    return (sign if kind & 1 else 1) * (1 - 2 * parity if kind & 2 else 1)


@njit(**_OPTIONS)
def _gather(flat, group, places, rests, units):
    """One column per unit, one row per thing that every unit of the group has; returns how many rows."""
    n, row = group[SIZE], 0
    for p in range(group[FIRST], group[LAST]):
        stride = places[p, STRIDE]
        for rest in range(places[p, REST], places[p, REST] + places[p, COUNT]):
            start = places[p, OFFSET] + rests[rest]
            target = units[row]
            for i in range(n):
                target[i] = flat[start + i * stride]
            row += 1
    return row


@njit(**_OPTIONS)
def _scatter(units, group, places, rests, shifts, source, sign, step, flat):
    """Write the units back, moved: place ``i`` gets unit ``source[i]``, turned and shifted."""
    n, row = group[SIZE], 0
    for p in range(group[FIRST], group[LAST]):
        stride, kind, shift = places[p, STRIDE], places[p, KIND], shifts[p]
        for rest in range(places[p, REST], places[p, REST] + places[p, COUNT]):
            start = places[p, OFFSET] + rests[rest]
            taken = units[row]
            if kind == 0 and shift == 0.0:
                for i in range(n):
                    flat[start + i * stride] = taken[source[i]]
            else:
                for i in range(n):
                    value = taken[source[i]] * _factor(kind, sign[i], step[i] & 1)
                    flat[start + i * stride] = value + step[i] * shift if shift else value
            row += 1


@njit(**_OPTIONS)
def _add_products(left, right, first, last, sums):
    """``sums += left[first:last].T @ right[first:last]``, eight rows at a time: an eighth of the loads and stores.

    Rows outside, units inside: the sums of one unit do not wait for each other.
    """
    n, k = sums.shape[0], first
    while k + 8 <= last:
        s, t, u, v = right[k], right[k + 1], right[k + 2], right[k + 3]
        w, x, y, z = right[k + 4], right[k + 5], right[k + 6], right[k + 7]
        for i in range(n):
            a, b, c, d = left[k, i], left[k + 1, i], left[k + 2, i], left[k + 3, i]
            e, f, g, h = left[k + 4, i], left[k + 5, i], left[k + 6, i], left[k + 7, i]
            total = sums[i]
            for j in range(n):
                first_half = (a * s[j] + b * t[j]) + (c * u[j] + d * v[j])
                total[j] += first_half + ((e * w[j] + f * x[j]) + (g * y[j] + h * z[j]))
        k += 8
    while k < last:
        w = right[k]
        for i in range(n):
            a, total = left[k, i], sums[i]
            for j in range(n):
                total[j] += a * w[j]
        k += 1


@njit(**_OPTIONS)
def _compare(left, right, group, places, shifts, settled, sums, near, far):
    """Inner products of the units by what flips them, and what phases see of either side.

    Args:
        left: units of the reference.
        right: units of the weights as they stand.
        group: row of the table of groups.
        places: the table of places.
        shifts: what a step adds there.
        settled: whether only settled places count.
        sums: (KINDS, size, size), out.
        near: (size,) float64, out: sum of shift times reference.
        far: (size,) float64, out: sum of shift times weights.

    Returns:
        Whether any place counted, and the sum of squares of the shifts.
    """
    n, row, any_place, squares = group[SIZE], 0, False, 0.0
    _fill(sums.reshape(sums.size), 0)
    _fill(near, 0.0)
    _fill(far, 0.0)
    for p in range(group[FIRST], group[LAST]):
        last = row + places[p, COUNT]
        if places[p, SETTLED] or not settled:
            any_place = True
            _add_products(left, right, row, last, sums[places[p, KIND]])
            if shifts[p] != 0.0:
                squares += shifts[p] * shifts[p] * places[p, COUNT]
                for k in range(row, last):
                    for i in range(n):
                        near[i] += shifts[p] * left[k, i]
                        far[i] += shifts[p] * right[k, i]
        row = last
    return any_place, squares


@njit(**_OPTIONS)
def _best_step(parity, seen, squares):
    """The steps of a phase, of this parity, that bring what they shift closest."""
    return parity + 2.0 * np.rint(0.5 * (seen / squares - parity))


@njit(**_OPTIONS)
def _turned(sums, i, j, sign, parity):
    """What unit ``j`` at place ``i`` contributes with this sign and parity."""
    value = sums[0, i, j] + _factor(1, sign, parity) * sums[1, i, j]
    return (value + _factor(2, sign, parity) * sums[2, i, j]) + _factor(3, sign, parity) * sums[3, i, j]


@njit(**_OPTIONS)
def _score(sums, group, near, far, squares, score):
    """The most that each unit can contribute at each place, over signs and phases."""
    n = group[SIZE]
    for parity in range(1 + group[PHASED]):
        for turn in range(1 + group[SIGNED]):
            sign = 1 - 2 * turn
            first = parity == 0 and turn == 0
            turned = _factor(group[SHIFTED], sign, parity)
            for i in range(n):
                for j in range(n):
                    value = _turned(sums, i, j, sign, parity)
                    if squares > 0.0:
                        seen = near[i] - turned * far[j]
                        step = _best_step(parity, seen, squares)
                        value += step * seen - 0.5 * squares * step * step
                    score[i, j] = value if first or value > score[i, j] else score[i, j]


@njit(**_OPTIONS)
def _decide(sums, group, near, far, squares, source, sign, step):
    """Signs and steps for the chosen units; returns the gain over leaving everything as it is."""
    gain = 0.0
    for i in range(group[SIZE]):
        j = source[i]
        best = -np.inf
        for parity in range(1 + group[PHASED]):
            for turn in range(1 + group[SIGNED]):
                flip = 1 - 2 * turn
                value, steps = _turned(sums, i, j, flip, parity), float(parity)
                if squares > 0.0:
                    seen = near[i] - _factor(group[SHIFTED], flip, parity) * far[j]
                    steps = _best_step(parity, seen, squares)
                    value += steps * seen - 0.5 * squares * steps * steps
                if value > best:
                    best = value
                    sign[i], step[i] = flip, int(steps)
        gain += best - np.float64(_turned(sums, i, i, 1, 0))
    return gain


@njit(**_OPTIONS)
def _compose(group, source, sign, step, element, old):
    """What an element comes to when a move of one group follows it."""
    total_source, total_sign, total_step = element[0], element[1], element[2]
    n, first, kind = group[SIZE], group[UNITS], group[SHIFTED]
    for i in range(n):
        old[0, i], old[1, i], old[2, i] = (
            total_source[first + i],
            total_sign[first + i],
            total_step[first + i],
        )
    for i in range(n):
        j = source[i]
        total_source[first + i] = old[0, j]
        total_sign[first + i] = old[1, j] * sign[i]
        total_step[first + i] = step[i] + old[2, j] * _factor(kind, sign[i], step[i] & 1)


# ------------------------------------------------------------------------------------------- whole pairs


@njit(**_SUMS)
def _squares(values):
    """Sum of squares."""
    total = 0.0
    for at in range(values.size):
        total += np.float64(values[at]) * np.float64(values[at])
    return total


@njit(**_SUMS)
def _outcome(reference, weights, outcome):
    """Inner product and squared distance."""
    product, squares = 0.0, 0.0
    for at in range(reference.size):
        a, b = np.float64(reference[at]), np.float64(weights[at])
        product += a * b
        squares += (a - b) * (a - b)
    outcome[0], outcome[1] = product, squares


@njit(**_OPTIONS)
def _measure(reference, weights, boundaries, shifted, norms, scales):
    """Norms of every tensor, and bounds of what their inner products can be; returns how large all can be."""
    total = 0.0
    for t in range(boundaries.size - 1):
        squares_a = _squares(reference[boundaries[t] : boundaries[t + 1]])
        squares_b = _squares(weights[boundaries[t] : boundaries[t + 1]])
        norms[0, t], norms[1, t] = np.sqrt(squares_a), np.sqrt(squares_b)
        scales[t] = 0.5 * (squares_a + squares_b) if shifted[t] else norms[0, t] * norms[1, t]
        total += norms[0, t] + norms[1, t]
    return total * total


@njit(**_OPTIONS)
def _scale(scales, held):
    """What the inner product of some tensors can be."""
    total = 0.0
    for t in range(scales.size):
        total += scales[t] if held[t] else 0.0
    return total


@njit(**_OPTIONS)
def _rows(group, places):
    """How many numbers a unit has."""
    rows = 0
    for p in range(group[FIRST], group[LAST]):
        rows += places[p, COUNT]
    return rows


@njit(**_OPTIONS)
def _begin(element, groups, places, rests, shifts, all_right, moved):
    """Let the element with which a run begins act."""
    for g in range(groups.shape[0]):
        group, n = groups[g], groups[g, SIZE]
        first, last = group[UNITS], group[UNITS] + n
        right = all_right[: n * _rows(group, places)].reshape((-1, n))
        _gather(moved, group, places, rests, right)
        source, sign, step = element[0, first:last], element[1, first:last], element[2, first:last]
        _scatter(right, group, places, rests, shifts, source, sign, step, moved)


@njit(**_OPTIONS)
def match_pairs(
    reference,
    weights,
    rows,
    groups,
    places,
    rests,
    shifts,
    neighbours,
    holds,
    boundaries,
    shifted,
    starts,
    orders,
    by_layer,
    max_sweeps,
    rounding,
    tolerance,
    limit,
    counter,
    elements,
    outcomes,
    sweeps,
    norms,
):
    """Match the pairs whose tickets this thread draws, from every start, and keep the best.

    Args:
        reference: (networks, parameters) float32 or float64, flat in the order of the spec.
        weights: like ``reference``, maybe of another number of networks.
        rows: (2, pairs) int64, which networks of either make a pair.
        groups: (groups, 8) int64, see the names of the columns above: units, where they begin among all units, first
            and last place, whether its units are permuted, flipped, shifted, and the kind of what is shifted.
        places: (places, 6) int64: offset of the first unit's first number, distance between units, where its
            numbers begin among the rests and how many they are, kind, and whether it is settled once the groups
            before are matched.
        rests: int64, offsets of a unit's numbers from its first.
        shifts: (places,) float64, what one step of a phase adds; 0 for nothing.
        neighbours: (groups, groups) bool, whose similarities change when the first moves.
        holds: (groups, tensors) bool, whether a group occurs in a tensor.
        boundaries: (tensors + 1,) int64, of the tensors among the parameters.
        shifted: (tensors,) bool, whether phases shift some of it.
        starts: (starts, 3, units) int64, the elements with which the runs begin: permutations, signs, steps.
        orders: (starts, sweeps, groups) int64, the groups in the order of each sweep; they come round again.
        by_layer: the start that matches layer by layer first.
        max_sweeps: upper limit of sweeps.
        rounding: share of what an inner product can be that a move must gain to be taken.
        tolerance: share of what the inner product can be that a sweep must gain for another to follow; 0 for any.
        limit: what the square of the sum of all norms may not exceed; such a pair is left out.
        counter: (1,) int64, the next pair; shared by the threads.
        elements: (3, pairs, units) int64, out: permutations, signs and steps of all groups.
        outcomes: (pairs, 3) float64, out: inner product, distance before and after.
        sweeps: (pairs,) int64, out.
        norms: (pairs, 2, tensors) float64, out.
    """
    all_groups, widest, longest = groups.shape[0], 1, 1
    room = np.zeros(all_groups + 1, np.int64)
    for g in range(all_groups):
        size = groups[g, SIZE] * _rows(groups[g], places)
        room[g + 1] = room[g] + size
        widest, longest = max(widest, groups[g, SIZE]), max(longest, size)
    all_left, all_right = np.empty(room[all_groups], weights.dtype), np.empty(longest, weights.dtype)
    all_sums = np.empty(KINDS * widest * widest, weights.dtype)
    all_scores = np.empty(widest * widest, weights.dtype)
    all_numbers, all_whole = np.empty(4 * widest, np.float64), np.empty(5 * widest, np.int64)
    shift_sums = np.empty((2, widest), np.float64)
    near, far = shift_sums[0], shift_sums[1]
    move, old = np.empty((3, widest), np.int64), np.empty((3, widest), np.int64)
    source, sign, step = move[0], move[1], move[2]
    element = np.empty((3, starts.shape[2]), np.int64)
    moved = np.empty(weights.shape[1], weights.dtype)
    scales, outcome = np.empty(boundaries.size - 1), np.empty(2)
    stale, everything = np.empty(all_groups, np.bool_), np.ones(boundaries.size - 1, np.bool_)
    phases = False
    for t in range(shifted.size):
        phases = phases or shifted[t]

    while True:
        pair = _take_ticket(counter)
        if pair >= rows.shape[1]:
            break
        a, b = reference[rows[0, pair]], weights[rows[1, pair]]
        if not _measure(a, b, boundaries, shifted, norms[pair], scales) <= limit:
            continue
        _outcome(a, b, outcome)
        outcomes[pair, 1] = np.sqrt(outcome[1])
        for g in range(all_groups):
            left = all_left[room[g] : room[g + 1]].reshape((-1, groups[g, SIZE]))
            _gather(a, groups[g], places, rests, left)

        best = 0.0
        for start in range(starts.shape[0]):
            _copy(b, moved)
            for row in range(3):
                _copy(starts[start, row], element[row])
            if start > 1:
                _begin(element, groups, places, rests, shifts, all_right, moved)
            _fill(stale, True)
            forward, sweep = start == by_layer, 0
            while forward or sweep < max_sweeps:
                busy = forward
                for at in range(all_groups):
                    busy = busy or stale[at]
                if not busy:
                    break
                gained = 0.0
                for at in range(all_groups):
                    g = at if forward else orders[start, sweep % orders.shape[1], at]
                    if not (forward or stale[g]):
                        continue
                    stale[g] = False
                    group, n = groups[g], groups[g, SIZE]
                    left = all_left[room[g] : room[g + 1]].reshape((-1, n))
                    right = all_right[: left.size].reshape((-1, n))
                    sums = all_sums[: KINDS * n * n].reshape((KINDS, n, n))
                    _gather(moved, group, places, rests, right)
                    counts, squares = _compare(left, right, group, places, shifts, forward, sums, near, far)
                    if not counts:
                        continue
                    if group[PERMUTED]:
                        score = all_scores[: n * n].reshape((n, n))
                        _score(sums, group, near, far, squares, score)
                        numbers, whole = (
                            all_numbers[: 4 * n].reshape((4, n)),
                            all_whole[: 5 * n].reshape((5, n)),
                        )
                        assign(score, source, numbers, whole)
                    else:
                        for i in range(n):
                            source[i] = i
                    gain = _decide(sums, group, near, far, squares, source, sign, step)
                    if gain > rounding * _scale(scales, holds[g]):
                        gained += gain
                        _scatter(right, group, places, rests, shifts, source, sign, step, moved)
                        _compose(group, source, sign, step, element, old)
                        for other in range(all_groups):
                            stale[other] = stale[other] or neighbours[g, other]
                if forward:
                    _fill(stale, True)
                else:
                    sweep += 1
                    if tolerance > 0.0 and gained <= tolerance * _scale(scales, everything):
                        break
                forward = False

            _outcome(a, moved, outcome)
            value = -0.5 * outcome[1] if phases else outcome[0]
            if start == 0 or value - best > rounding * _scale(scales, everything):
                best = value
                outcomes[pair, 0], outcomes[pair, 2] = outcome[0], np.sqrt(outcome[1])
                sweeps[pair] = sweep
                for row in range(3):
                    _copy(element[row], elements[row, pair])
