"""The average of networks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.align import weight_matching
from weightspace.errors import ConfigError, SpecError
from weightspace.merge import average
from weightspace.spec import Frozen, TensorSpec, WeightSpec
from weightspace.testing import random_weights

SPEC = WeightSpec.mlp([2, 6, 5, 1], activation="tanh")


def test_the_midpoint_by_hand():
    a = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(-1.0)}
    b = {"w": torch.tensor([[3.0, -4.0]]), "b": torch.tensor(5.0)}
    merged = average([a, b])
    assert merged["w"].tolist() == [[2.0, -1.0]]
    assert merged["b"].item() == 2.0
    assert a["w"].tolist() == [[1.0, 2.0]], "the caller's weights are left alone"


def test_coefficients_are_taken_as_given():
    networks = [{"w": torch.tensor([value])} for value in (1.0, 10.0, 100.0)]
    assert average(networks, [2.0, 0.0, -1.0])["w"].item() == -98.0
    assert average(networks, weights=[1, 1, 1])["w"].item() == 111.0
    assert average(networks)["w"].item() == pytest.approx(37.0)
    assert average(networks[:1])["w"].item() == 1.0


def test_the_result_shares_no_memory():
    network = {"w": torch.ones(3), "count": torch.tensor(1)}
    merged = average([network])
    merged["w"].zero_()
    merged["count"].zero_()
    assert network["w"].tolist() == [1.0, 1.0, 1.0]
    assert network["count"].item() == 1


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([("permutation",), ("permutation", "sign")]))
def test_a_network_and_its_aligned_copy_average_to_itself(seed, symmetries):
    generator = torch.Generator().manual_seed(seed)
    a = random_weights(SPEC, (4,), seed)
    b = SPEC.act(SPEC.random_element((4,), symmetries=symmetries, generator=generator), a)
    aligned, _ = weight_matching(SPEC, a, b, symmetries=symmetries, restarts=2)
    merged = average([a, aligned], spec=SPEC)
    assert all(torch.equal(merged[name], a[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_stays_and_halves_are_summed_in_float32(dtype):
    """40000 + 40000 exceeds float16, their mean does not."""
    networks = [{"w": torch.tensor([40000.0], dtype=dtype)} for _ in range(3)]
    merged = average(networks, [1.0, 1.0, -1.0])["w"]
    assert merged.dtype == dtype
    assert merged.item() == networks[0]["w"].item()


def test_different_dtypes_give_the_wider_one():
    a, b = {"w": torch.ones(2)}, {"w": torch.zeros(2, dtype=torch.float16)}
    for networks in ([a, b], [b, a]):
        merged = average(networks)["w"]
        assert merged.dtype == torch.float32
        assert merged.tolist() == [0.5, 0.5]


def test_counters_and_masks_are_those_of_the_first():
    a = {"w": torch.tensor([0.0]), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    b = {"w": torch.tensor([1.0]), "steps": torch.tensor(8), "mask": torch.tensor([False, False])}
    merged = average([a, b])
    assert merged["steps"].item() == 7
    assert merged["steps"].dtype == torch.int64
    assert merged["mask"].tolist() == [True, False]


def test_gradients_reach_every_network():
    networks = [{"w": torch.ones(2, requires_grad=True)} for _ in range(2)]
    average(networks, [0.25, 0.75])["w"].sum().backward()
    assert networks[0]["w"].grad.tolist() == [0.25, 0.25]
    assert networks[1]["w"].grad.tolist() == [0.75, 0.75]


CONSTANT = WeightSpec(
    Frozen(), Frozen({"w": TensorSpec.dense((2,), [None])}), constants=Frozen({"grid": (2,)})
)


def test_constants_must_be_equal_and_stay():
    third = torch.tensor([0.1, 0.7])
    networks = [{"w": torch.full((2,), value), "grid": third.clone()} for value in (1.0, 2.0, 3.0)]
    merged = average(networks, [1.0, 1.0, 1.0], spec=CONSTANT)
    assert torch.equal(merged["grid"], third)
    assert merged["w"].tolist() == [6.0, 6.0]
    networks[2]["grid"][0] = 0.2
    with pytest.raises(SpecError, match="network 2: constant 'grid' differs from that of network 0"):
        average(networks, spec=CONSTANT)


@pytest.mark.parametrize(
    ("networks", "weights", "error", "message"),
    [
        ([], None, ConfigError, "expected at least one, found none"),
        ([{"w": torch.ones(1)}] * 2, [1.0], ConfigError, "expected one per network, 2, found 1"),
        ([{"w": torch.ones(1)}] * 2, [1.0, torch.nan], ConfigError, "finite coefficients, found nan at 1"),
        (
            [{"w": torch.ones(1)}, {}],
            None,
            SpecError,
            "network 1: tensor 'w' of network 0 is missing",
        ),
        (
            [{}, {"w": torch.ones(1)}],
            None,
            SpecError,
            "network 0: tensor 'w' of network 1 is missing",
        ),
        (
            [{"w": torch.ones(1, 2)}, {"w": torch.ones(2)}],
            None,
            SpecError,
            r"network 1: 'w' should have shape \[1, 2\] as in network 0, found \[2\]",
        ),
    ],
)
def test_what_cannot_be_averaged_is_named(networks, weights, error, message):
    with pytest.raises(error, match=message):
        average(networks, weights)


def test_the_spec_is_checked_too():
    with pytest.raises(SpecError, match=r"'w' should end in shape \[2\], found \[3\]"):
        average([{"w": torch.ones(3)}], spec=CONSTANT)
    with pytest.raises(SpecError, match="unknown tensor 'v'"):
        average([{"v": torch.ones(3)}], spec=CONSTANT)
