"""What every merge method keeps to; see ``weightspace.testing.MergeContract``."""

from inspect import signature
from typing import ClassVar

import pytest

from weightspace.merge import MERGERS, merger
from weightspace.testing import MergeContract


class TestAverage(MergeContract):
    method = "average"


class TestWeighted(MergeContract):
    method = "weighted"
    options: ClassVar = {"weights": [0.5, 1.0, 2.0]}
    neutral: ClassVar = {"weights": [0.5, -1.0, 3.0]}
    symmetric = False


class TestSlerp(MergeContract):
    method = "slerp"
    count = 2


class TestSlerpNearTheFirst(MergeContract):
    method = "slerp"
    count = 2
    options: ClassVar = {"t": 0.25}
    symmetric = False


class TestTaskArithmetic(MergeContract):
    method = "task-arithmetic"
    neutral: ClassVar = {"weights": [1 / 3] * 3}


class TestTies(MergeContract):
    method = "ties"
    neutral: ClassVar = {"density": 1}


class TestDare(MergeContract):
    method = "dare"
    neutral: ClassVar = {"rate": 0, "weights": [1 / 3] * 3}
    symmetric = False  # what is dropped depends on the place


class TestDareTies(MergeContract):
    method = "dare-ties"
    neutral: ClassVar = {"rate": 0, "density": 1}
    symmetric = False


class TestFisher(MergeContract):
    method = "fisher"


class TestGradientMatching(MergeContract):
    method = "gradient-matching"
    neutral: ClassVar = {"weights": [1 / 3] * 3}


class TestRegMean(MergeContract):
    method = "regmean"


class TestModelStock(MergeContract):
    method = "model-stock"


class TestGreedySoup(MergeContract):
    method = "greedy-soup"

    def test_memory_holds_one_tensor_of_each_network(self):
        """Not so: whole soups are scored."""


def test_every_method_is_tested():
    tested = {cls.method for name, cls in globals().items() if name.startswith("Test")}
    assert tested == set(MERGERS)


@pytest.fixture
def careless():
    """A method that reads everything first, and returns what belongs to the first network."""

    def plan(stack):
        held = {name: stack.tensors(name) for name in stack.names}
        return lambda name: held[name][0]

    merger("careless", plan, everywhere=True)(lambda networks: {})

    class Careless(MergeContract):
        method = "careless"

    yield Careless()
    del MERGERS["careless"]


@pytest.mark.parametrize("name", ["the_order", "memory_holds", "inputs_are_left_alone"])
def test_the_contract_finds_a_careless_method(careless, name):
    (test,) = (found for found in dir(careless) if found.startswith(f"test_{name}"))
    with pytest.raises(AssertionError):
        getattr(careless, test)()


def test_plans_take_the_options_that_the_public_functions_declare():
    for name, found in MERGERS.items():
        given = {"score"} if found.score else set()
        assert set(signature(found.plan).parameters) - {"stack", "deltas"} == {*found.options, *given}, name


def test_methods_say_what_they_do_and_what_they_take():
    assert MERGERS["ties"].effect.startswith("Trim task vectors")
    assert dict(MERGERS["ties"].options) == {"density": 0.2, "weights": None, "scaling": 1.0}
    assert {name for name, found in MERGERS.items() if found.base} == {
        "task-arithmetic", "ties", "dare", "dare-ties", "gradient-matching", "model-stock"
    }  # fmt: skip
