"""Labels: which unit each entry of a value belongs to, through reshapes, cuts and identifications."""

import math

import pytest
import torch

from weightspace.spec.tracing import _operations as op
from weightspace.spec.tracing._atoms import Atoms
from weightspace.spec.tracing._labels import Box, Index, Label, Labels, regroup


@pytest.fixture
def t():
    """Labels whose atoms are all new."""
    return Labels(Atoms())


def vector(t, size):
    """A label with one free axis."""
    return t.fresh([size])


def units(t, label):
    """For every entry, the atoms and positions of its indices on all axes, outermost first."""
    label = t.resolve(label)
    found = {}
    for box in label.boxes:
        sizes = [t.size(index) for index in box.indices]
        for place in (
            torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes)).tolist()
            if sizes
            else [[]]
        ):
            at = list(box.offsets)
            for index, step in zip(box.indices, place, strict=True):
                at[index.axis] += index.stride * step
            assert tuple(at) not in found, "boxes overlap"
            found[tuple(at)] = [(index.atom, step) for index, step in zip(box.indices, place, strict=True)]
    assert len(found) == math.prod(label.shape), "boxes leave a gap"
    return found


def test_a_reshape_reads_the_same_units_in_another_shape(t):
    label = vector(t, 6)
    matrix = t.reshape(label, [2, 3])
    before, after = units(t, label), units(t, matrix)
    assert [before[(at,)] for at in range(6)] == [
        after[(row, column)] for row in range(2) for column in range(3)
    ]


def test_a_reshape_back_is_the_label_itself(t):
    label = t.fresh([4, 6])
    there = t.reshape(label, [4, 2, 3])
    assert t.reshape(there, [4, 6]).boxes == t.resolve(label).boxes


def test_axes_without_a_common_factorisation_are_fixed(t):
    label = vector(t, 12)
    t.reshape(label, [3, 4])
    sixes = t.reshape(label, [2, 6])
    assert t.is_fixed(t.resolve(sixes))
    assert t.is_fixed(t.resolve(label))


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ([6], [2, 3], [([0], [0, 1])]),
        ([4, 6], [4, 2, 3], [([0], [0]), ([1], [1, 2])]),
        ([4, 3, 2], [12, 2], [([0, 1], [0]), ([2], [1])]),
        ([2, 3, 4], [4, 6], [([0, 1, 2], [0, 1])]),
    ],
)
def test_reshaped_axes_are_grouped_as_finely_as_can_be(old, new, groups):
    assert regroup(old, new) == groups


def test_parts_that_are_joined_again_are_the_whole(t):
    label = t.fresh([4, 6])
    parts = [op.narrow(t, label, 1, start, 3) for start in (0, 3)]
    joined = op.concatenate(t, parts, 1)
    assert units(t, joined) == units(t, label)
    assert len({box.indices[-1].atom for box in t.resolve(label).boxes}) == 2


def test_identified_axes_agree_where_either_is_cut(t):
    pieces = op.concatenate(t, [vector(t, 2), vector(t, 4)], 0)
    whole, pieces, pairs = t.unify(vector(t, 6), pieces, [(0, 0)])
    assert units(t, whole) == units(t, pieces)
    assert [t.size(pair[0]) for pair in pairs] == [2, 4]


def test_identification_with_a_shifted_cut_is_the_common_refinement(t):
    first = op.concatenate(t, [vector(t, 2), vector(t, 4)], 0)
    second = op.concatenate(t, [vector(t, 3), vector(t, 3)], 0)
    first, second, _ = t.unify(first, second, [(0, 0)])
    assert units(t, first) == units(t, second)
    assert [t.size(box.indices[0]) if box.indices else 1 for box in first.boxes] == [2, 1, 3]


def test_a_dropped_axis_leaves_no_dependence(t):
    label = t.fresh([4, 6])
    (box,) = t.resolve(label).boxes
    rows, columns = (index.atom for index in box.indices)
    assert t.atoms[columns].parents == {rows}
    assert t.drop(label, [0]) == t.resolve(t.drop(label, [0]))
    assert t.atoms[columns].parents == set()


def test_parts_of_different_units_cannot_be_summed_apart(t):
    """Summing over the outer of two axes of a concatenation identifies what is laid over each other."""
    stacked = op.concatenate(t, [op.unsqueeze(t, vector(t, 5), 0) for _ in range(2)], 0)
    summed = t.drop(stacked, [0])
    assert summed == t.resolve(summed)
    assert len(summed.boxes) == 1
    assert len(t.numbers(t.resolve(stacked))) == 1


def test_a_repetition_is_a_new_index_within_the_others(t):
    label = op.spread(t, op.unsqueeze(t, vector(t, 5), 1), [5, 3])
    (box,) = label.boxes
    unit, copy = (index.atom for index in box.indices)
    assert (t.atoms[copy].size, t.atoms[copy].parents) == (3, {unit})


def test_frozen_axes_change_their_size_and_the_others_stay(t):
    label = t.fresh([5, 8, 8])
    frozen = t.freeze(label, {1: 3, 2: 3})
    assert frozen.shape == (5, 3, 3)
    assert [t.atoms.is_live(index.atom) for box in frozen.boxes for index in box.indices] == [
        True,
        False,
        False,
    ]


def test_axes_of_size_one_carry_no_index(t):
    assert t.fresh([1, 5, 1]).boxes == (Box((0, 0, 0), (Index(1, 1, 0),)),)


def test_zero_scales_with_whatever_it_meets(t):
    t.powers = "positive"
    zero = vector(t, 5)._replace(zero=True)
    (box,) = t.loose(zero).boxes
    assert box.indices[0].power != ()
    assert t.loose(zero._replace(zero=False)).boxes == zero.boxes


def test_fixed_axes_that_are_divided_differently_meet_in_their_common_parts(t):
    twos = op.concatenate(t, [t.fixed([2]), t.fixed([4]), vector(t, 3)], 0)
    fours = op.concatenate(t, [t.fixed([4]), t.fixed([2]), vector(t, 3)], 0)
    product = op.pointwise(t, [twos, fours], "multiply")
    units(t, product)
    assert [box.offsets for box in product.boxes] == [(0,), (2,), (4,), (6,)]


def test_a_copy_is_found_by_the_part_on_its_own_axis(t):
    """Rows and columns are (copy, unit): once the units are cut, each axis has the copies of its own part."""
    unit = t.atoms.fresh(5)
    copy = t.atoms.fresh(3, [unit])
    pairs = [(Index(axis, 5, copy), Index(axis, 1, unit)) for axis in (0, 1)]
    matrix = Label((15, 15), (Box((0, 0), (*pairs[0], *pairs[1])),))
    t.atoms.cut(unit, [2, 3])
    boxes = t.resolve(matrix).boxes
    assert len(boxes) == 4
    for box in boxes:
        for axis in (0, 1):
            of_copy, of_unit = (index.atom for index in box.indices if index.axis == axis)
            assert t.atoms[of_copy].parents == {of_unit}
