"""Atoms: what a restriction leaves, and that what depends on an index is closed under dependence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightspace.spec.tracing._atoms import Atoms, Product, Sum


def nested():
    """An outer atom of 6 units, and two within it, of which the second is within the first too."""
    atoms = Atoms()
    outer = atoms.fresh(6)
    middle = atoms.fresh(5, [outer])
    return atoms, outer, middle, atoms.fresh(4, [outer, middle])


def parents(atoms, *numbers):
    return [atoms[number].parents for number in numbers]


def test_merging_keeps_what_both_depend_on():
    atoms, outer, middle, inner = nested()
    alone = atoms.fresh(5)
    atoms.merge([(alone, middle)])
    assert atoms.find(alone) == atoms.find(middle) == middle
    assert parents(atoms, middle) == [set()]
    assert atoms[outer].children == {inner}


def test_pairs_are_merged_together_before_dependences_are_compared():
    """Two nested pairs become one nested pair: the parents agree once they are the same."""
    atoms = Atoms()
    first, second = atoms.fresh(6), atoms.fresh(6)
    within_first, within_second = atoms.fresh(4, [first]), atoms.fresh(4, [second])
    atoms.merge([(within_first, within_second), (first, second)])
    assert parents(atoms, atoms.find(within_second)) == [{first}]


def test_merging_with_a_fixed_atom_fixes():
    atoms, outer, middle, _ = nested()
    atoms.merge([(outer, atoms.fresh(6, pinned="input x"))])
    assert not atoms.is_live(outer)
    assert atoms[outer].pinned == "input x"
    assert parents(atoms, middle) == [{outer}]


def test_what_is_fixed_may_still_be_depended_on_until_it_is_released():
    atoms, outer, middle, inner = nested()
    atoms.pin(outer, "output")
    assert parents(atoms, middle, inner) == [{outer}, {outer, middle}]
    assert not atoms.is_inert(outer)
    atoms.release(outer)
    assert parents(atoms, middle, inner) == [set(), {middle}]
    assert atoms.is_inert(outer)


def test_the_first_reason_is_kept():
    atoms = Atoms()
    number = atoms.fresh(3)
    atoms.pin(number, "roll")
    atoms.pin(number, "output")
    assert atoms[number].pinned == "roll"


def test_a_parent_is_lost_with_what_it_depends_on():
    atoms, outer, middle, inner = nested()
    atoms.restrict({inner: {middle}})
    assert parents(atoms, inner) == [set()]
    assert parents(atoms, middle) == [{outer}]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_atoms_that_depend_on_each_other_are_restricted_together(order):
    """Neither loses the other because the other has yet to lose a third."""
    atoms = Atoms()
    third, *both = (atoms.fresh(size) for size in (7, 3, 2))
    atoms.entangle([third, *both])
    atoms.restrict({both[at]: set(both) for at in order})
    assert parents(atoms, *both) == [{both[1]}, {both[0]}]


def test_a_split_index_is_a_joint_index():
    atoms = Atoms()
    whole = atoms.fresh(6)
    child = atoms.fresh(4, [whole])
    product = atoms.split(whole, 2)
    assert product == Product(product.outer, product.inner)
    assert (atoms[product.outer].size, atoms[product.inner].size) == (3, 2)
    assert parents(atoms, *product) == [{product.inner}, {product.outer}]
    assert parents(atoms, child) == [{product.outer, product.inner}]
    joint = atoms.fuse(*product)
    assert atoms[joint].size == 6
    assert parents(atoms, joint, child) == [set(), {joint}]
    assert atoms.final(product.outer) == atoms.final(product.inner) == joint
    assert atoms.constituents(joint) == [product.outer, product.inner]


def test_what_depends_on_a_cut_index_gets_a_copy_for_each_part():
    atoms, outer, middle, inner = nested()
    parts = atoms.cut(outer, [2, 4])
    assert parts == Sum(parts.parts)
    assert [atoms[part].size for part in parts.parts] == [2, 4]
    assert [parents(atoms, copy) for copy in atoms.leaves(middle)] == [[{part}] for part in parts.parts]
    assert [atoms[copy].parents for copy in atoms.leaves(inner)] == [
        {part, copy} for part, copy in zip(parts.parts, atoms.leaves(middle), strict=True)
    ]


def test_nothing_depends_on_a_part_of_one():
    atoms, outer, middle, _ = nested()
    atoms.cut(outer, [1, 5])
    alone, among = atoms.leaves(middle)
    assert atoms[alone].parents == set()
    assert len(atoms[among].parents) == 1


@given(st.data())
def test_dependence_is_closed_whatever_happens(data):
    atoms = Atoms()
    atoms.entangle([atoms.fresh(6) for _ in range(3)])
    atoms.entangle([atoms.fresh(6) for _ in range(2)])
    for move in data.draw(
        st.lists(st.sampled_from(["pin", "release", "restrict", "merge", "split", "cut"]), max_size=8)
    ):
        free = [number for number in range(len(atoms)) if atoms[number].link is None]
        first, second = data.draw(st.tuples(st.sampled_from(free), st.sampled_from(free)))
        if move == "pin":
            atoms.pin(first, "reason")
        elif move == "release":
            atoms.release(first)
        elif move == "restrict":
            atoms.restrict({first: atoms[first].parents - {second}, second: set()})
        elif move == "merge" and atoms[first].size == atoms[second].size:
            atoms.merge([(first, second)])
        elif move == "split" and atoms[first].size % 2 == 0:
            atoms.split(first, 2)
        elif move == "cut" and atoms[first].size > 1:
            atoms.cut(first, [1, atoms[first].size - 1])
    for number in range(len(atoms)):
        atom = atoms[number]
        if atom.link is not None:
            assert not atom.parents
            assert not atom.children
        for parent in atom.parents:
            assert atoms[parent].link is None
            assert number in atoms[parent].children
            assert atoms[parent].parents <= atom.parents | {number}
        assert atoms.is_live(number) or not atom.parents
