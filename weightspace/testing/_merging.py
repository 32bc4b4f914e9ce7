"""What every merge method must keep to, as a class of tests to inherit, and networks to merge."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from weightspace.merge import find_merger, merge_networks, prepare
from weightspace.spec import Weights


class LazyNetwork(Mapping[str, Tensor]):
    """A network that hands out copies, and counts how many of them are in use at the same time.

    Args:
        weights: what it hands out.
        live: the copies in use, shared with other networks.
    """

    def __init__(self, weights: Mapping[str, Tensor], live: LiveTensors) -> None:
        self._weights, self._live = weights, live

    def __getitem__(self, name: str) -> Tensor:
        return self._live.copy(self._weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def meta(self, name: str) -> Tensor:
        """Shape and dtype, without a copy."""
        return self._weights[name].to("meta")

    def tied(self, name: str) -> str:
        """The first name of the same tensor."""
        mine = self._weights[name]
        return next(other for other, tensor in self._weights.items() if tensor is mine)


class LiveTensors:
    """Copies of tensors, counted from when they are made until their memory is freed."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """One more, until neither it nor a view of it is left."""
        raw = tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor[None].view(torch.uint8)
        array = raw.numpy().copy()
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(array, self._freed)
        return torch.from_numpy(array).view(tensor.dtype).view(tensor.shape)

    def _freed(self) -> None:
        self.now -= 1


def merge_inputs(
    seed: int = 0, dtype: torch.dtype = torch.float32, *, distance: float = 0.1, largest: int = 0
) -> Weights:
    """A network to merge: matrices, vectors, a norm with its statistics, a counter, a mask, tied weights.

    Args:
        seed: of how it differs from others.
        dtype: of all but the counter and the mask.
        distance: from the network that all have in common, which is what distance 0 gives.
        largest: elements of one more tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (6, 5),
        "conv.weight": (5, 2, 3),
        "norm.weight": (5,),
        "norm.running_mean": (5,),
        "norm.running_var": (5,),
        "scale": (),
    }
    if largest:
        shapes["large"] = (largest,)
    common, own = torch.Generator().manual_seed(12345), torch.Generator().manual_seed(seed)
    found: Weights = {}
    for name, shape in shapes.items():
        center = torch.randn(shape, generator=common, dtype=torch.float64)
        tensor = center + distance * torch.randn(shape, generator=own, dtype=torch.float64)
        found[name] = (tensor.square() + 0.5 if name.endswith("var") else tensor).to(dtype)
    found["norm.weight"][0] = 0.0  # a weight like any other
    found["norm.num_batches_tracked"] = torch.tensor(seed)
    found["mask"] = torch.tensor([True, seed % 2 == 0])
    found["head.weight"] = found["embed.weight"]
    return found


class MergeContract:
    """Tests that every merge method passes; inherit them, and name the method.

    Attributes:
        method: its registered name.
        count: how many networks are merged.
        options: with which they are merged.
        neutral: options with which equal networks merge to themselves.
        symmetric: whether the order of the networks does not matter.
    """

    method: ClassVar[str]
    count: ClassVar[int] = 3
    options: ClassVar[Mapping[str, Any]] = {}
    neutral: ClassVar[Mapping[str, Any]] = {}
    symmetric: ClassVar[bool] = True

    # -- what is merged ----------------------------------------------------------------------------------------

    def networks(self, dtype: torch.dtype = torch.float32, **options: Any) -> list[Weights]:
        """Networks with a common origin."""
        return [merge_inputs(seed, dtype, **options) for seed in range(1, self.count + 1)]

    def arguments(self, networks: list[Weights], **options: Any) -> dict[str, Any]:
        """What the method needs beside them."""
        found = find_merger(self.method)
        given: dict[str, Any] = {}
        if found.base:
            given["base"] = merge_inputs(0, networks[0]["scale"].dtype, distance=0.0, **options)
        if found.statistics == "fisher":
            given["statistics"] = [_information(network, seed) for seed, network in enumerate(networks)]
        if found.statistics == "grams":
            given["statistics"] = [_grams(network, seed) for seed, network in enumerate(networks)]
        if found.score:
            given["score"] = lambda network: -float(network["scale"].double().square())
        return given

    def merged(self, networks: list[Weights] | None = None, **options: Any) -> Weights:
        """The method's answer."""
        given = self.networks() if networks is None else networks
        return merge_networks(self.method, given, **{**self.arguments(given), **self.options, **options})

    # -- what must hold ----------------------------------------------------------------------------------------

    def test_equal_networks_merge_to_themselves(self) -> None:
        networks = [merge_inputs(1) for _ in range(self.count)]
        _assert_close(self.merged(networks, **self.neutral), networks[0])

    def test_the_order_of_networks_matters_only_where_it_should(self) -> None:
        networks = self.networks()
        given = {**self.arguments(networks), **self.options}
        turned = {**given}
        if "statistics" in given:
            turned["statistics"] = given["statistics"][::-1]
        forward = merge_networks(self.method, networks, **given)
        backward = merge_networks(self.method, networks[::-1], **turned)
        floating = {name for name, tensor in forward.items() if tensor.is_floating_point()}
        same = all(torch.allclose(forward[name], backward[name], 1e-5, 1e-6) for name in floating)
        assert same == self.symmetric

    def test_one_tensor_after_another_is_the_same_as_all_at_once(self) -> None:
        """Bit for bit, in any order, from networks that are read lazily."""
        networks = self.networks()
        arguments = {**self.arguments(networks), **self.options}
        live = LiveTensors()
        lazy = prepare(self.method, [LazyNetwork(network, live) for network in networks], **arguments)
        expected = merge_networks(self.method, networks, **arguments)
        assert list(lazy) == list(expected) == list(networks[0])
        for name in reversed(list(lazy)):
            found, meta = lazy[name], lazy.meta(name)
            assert torch.equal(found, expected[name])
            assert (meta.shape, meta.dtype, meta.device.type) == (found.shape, found.dtype, "meta")

    def test_memory_holds_one_tensor_of_each_network(self) -> None:
        networks, live = self.networks(), LiveTensors()
        arguments = {**self.arguments(networks), **self.options}
        sides = 0
        for name, given in arguments.items():
            if name == "base":
                arguments[name], sides = LazyNetwork(given, live), sides + 1
            elif name == "statistics":
                arguments[name], sides = [LazyNetwork(of, live) for of in given], sides + self.count
        for name, _ in prepare(
            self.method, [LazyNetwork(network, live) for network in networks], **arguments
        ).items():
            assert live.now == 0, name
        assert 0 < live.most <= self.count + sides

    def test_the_dtype_stays_and_half_precision_is_merged_in_float32(self) -> None:
        """Rounding to half precision at the end is all the difference."""
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            networks = self.networks(dtype)
            given = {**self.arguments(networks), **self.options}
            found = merge_networks(self.method, networks, **given)
            for name, tensor in networks[0].items():
                assert found[name].dtype == tensor.dtype
            if dtype != torch.float64:
                given |= {"base": _cast(given["base"], torch.float32)} if "base" in given else {}
                wide = merge_networks(self.method, [_cast(n, torch.float32) for n in networks], **given)
                assert all(torch.equal(found[name], _cast(wide, dtype)[name]) for name in found)

    def test_inputs_are_left_alone_and_share_no_memory_with_the_result(self) -> None:
        networks = self.networks()
        arguments = {**self.arguments(networks), **self.options}
        before = [{name: tensor.clone() for name, tensor in network.items()} for network in networks]
        for tensor in merge_networks(self.method, networks, **arguments).values():
            tensor.zero_()
        for network, copy in zip(networks, before, strict=True):
            assert all(torch.equal(network[name], copy[name]) for name in copy)

    def test_counters_stay_statistics_are_averaged_and_tied_weights_stay_tied(self) -> None:
        networks = self.networks()
        found = self.merged(networks)
        assert torch.equal(found["norm.num_batches_tracked"], networks[0]["norm.num_batches_tracked"])
        assert torch.equal(found["mask"], networks[0]["mask"])
        assert found["head.weight"] is found["embed.weight"]
        if not find_merger(self.method).everywhere:
            for name in ("norm.running_mean", "norm.running_var"):
                expected = torch.stack([network[name] for network in networks]).mean(0)
                assert torch.allclose(found[name], expected)

    def test_large_tensors_are_merged_as_small_ones_are(self) -> None:
        """What is merged in blocks must not depend on where they begin."""
        networks = self.networks(largest=70_000)
        arguments = {**self.arguments(networks, largest=70_000), **self.options}
        found = merge_networks(self.method, networks, **arguments)["large"]
        assert found.shape == (70_000,)
        # a block is 2^16 long: the rest behind it looks like what is before it
        moved = found - torch.stack([network["large"] for network in networks]).mean(0)
        front, back = moved[: 1 << 16].std(), moved[1 << 16 :].std()
        assert torch.isclose(front, back, rtol=0.1, atol=1e-6)


def _cast(network: Weights, dtype: torch.dtype) -> Weights:
    once = {
        id(t): t.to(dtype) if t.is_floating_point() else t for t in network.values()
    }  # tied ones stay tied
    return {name: once[id(tensor)] for name, tensor in network.items()}


def _assert_close(found: Weights, expected: Weights) -> None:
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), 1e-5, 1e-6), name


def _information(network: Weights, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, tensor in network.items() if tensor.is_floating_point() and "running" not in name]
    wide = {name: network[name].float() for name in names if name != "head.weight"}
    return {name: torch.rand(tensor.shape, generator=generator) for name, tensor in wide.items()}


def _grams(network: Weights, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in ("embed.weight", "conv.weight"):
        inputs = torch.randn(20, network[name][0].numel(), generator=generator, dtype=torch.float64)
        found[name] = inputs.T @ inputs
    return found
