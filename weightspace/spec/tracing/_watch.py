"""What the units of a spec's groups compute on data, for any module: its graph is run, and their values handed out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from jaxtyping import Shaped
from torch import Tensor, fx, nn

from weightspace.errors import SpecError
from weightspace.spec._arguments import check_weights
from weightspace.spec._types import WeightSpec
from weightspace.spec.tracing._program import (
    Inputs,
    Program,
    as_call,
    export,
    is_random,
    own_random_numbers,
    tensors_of,
)
from weightspace.spec.tracing._sites import Site, find_sites
from weightspace.spec.tracing._trace import RULES

_SINGLE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class Watch:
    """The values of a module's units, found from the spec and not from the names of its parts.

    The module is exported once for each shape of inputs, in evaluation mode, and the graph is run with any weights;
    a value is dropped after its last use. Which values are handed out, and what in them is a unit, says
    :attr:`Site.read`: for a hidden layer what follows the activation, for a residual stream every value that a layer
    reads, for attention the queries, keys and values of each head. Items and positions are samples.

    Half precision is computed in float32.

    Args:
        spec: a weight space of the module, traced or described by hand. That the outputs are those of the spec is not
            checked.
        module: the network; it is not changed.
        everywhere: groups of which every value is handed out that carries them, what enters the activation included.

    Raises:
        SpecError: on the first run: the module does not have the groups of the spec, or its tensors, or cannot be
            exported with the inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
        >>> spec = WeightSpec.trace(net, torch.zeros(2, 1, 4, 4))
        >>> watch = Watch(spec, net)
        >>> for site, values in watch.run(net.state_dict(), torch.randn(5, 1, 4, 4)):
        ...     print(site.group, tuple(values.shape))
        hidden0 (4, 20)
    """

    def __init__(self, spec: WeightSpec, module: nn.Module, everywhere: Collection[str] = ()) -> None:
        self.spec, self.module, self.everywhere = spec, module, frozenset(everywhere)
        self._plans: dict[object, _Plan] = {}
        self._programs: dict[object, Program] = {}
        self._modules: dict[torch.device, nn.Module] = {}

    def widened(self, groups: Collection[str]) -> Watch:
        """The same with all values of some groups; what was exported serves both."""
        other = Watch(self.spec, self.module, groups)
        other._programs, other._modules = self._programs, self._modules
        return other

    def sites(self, weights: Mapping[str, Tensor], inputs: Inputs) -> tuple[Site, ...]:
        """Which values are handed out, in order, on the device of ``weights``.

        Raises:
            SpecError: see the class.
        """
        return self._plan(_device(weights), inputs).sites

    def run(
        self, weights: Mapping[str, Tensor], inputs: Inputs
    ) -> Iterator[tuple[Site, Shaped[Tensor, "*units samples"]]]:
        """What the units of one network compute, one site after the other.

        Args:
            weights: one network, without batch axes: tensors of the spec, and constants if they are others than the
                module's.
            inputs: arguments of the module, on any device.

        Raises:
            SpecError: weights with batch axes, or that lack a tensor; and see the class.
        """
        named = _by_first_name(self.spec, weights)
        plan = self._plan(_device(weights), inputs)
        return plan.run(named, inputs)

    def _plan(self, device: torch.device, inputs: Inputs) -> _Plan:
        inputs = _single(inputs)
        leaves = pytree.tree_leaves(as_call(inputs))
        key = (device, *(_kind(leaf) for leaf in leaves))
        if key not in self._plans:
            module = self._module_on(device)
            if key not in self._programs:
                self._programs[key] = export(module, inputs, None, RULES)
            self._plans[key] = _make_plan(self.spec, module, self._programs[key], self.everywhere)
        return self._plans[key]

    def _module_on(self, device: torch.device) -> nn.Module:
        """The module, or a copy if it is elsewhere or of half precision: the graph says where and in what it computes."""
        parts = [*self.module.parameters(), *self.module.buffers()]
        if all(part.device == device and part.dtype not in _SINGLE for part in parts):
            return self.module
        if device not in self._modules:
            module = copy.deepcopy(self.module).to(device)
            self._modules[device] = module.float() if any(part.dtype in _SINGLE for part in parts) else module
        return self._modules[device]


def _device(weights: Mapping[str, Tensor]) -> torch.device:
    return next((tensor.device for tensor in weights.values()), torch.device("cpu"))


def _kind(leaf: object) -> object:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)


def _by_first_name(spec: WeightSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network, tied ones under the first of their names.

    Raises:
        SpecError: there are batch axes, or a tensor is missing.
    """
    if batch := check_weights(spec, weights):
        raise SpecError(f"weights: expected one network, found batch shape {list(batch)}")
    named = {spec.primary(name) or name: tensor for name, tensor in weights.items()}
    for name, tensor in spec.tensors.items():
        if name not in named:
            raise SpecError(f"weights: {tensor.kind} {name!r} is missing")
    return named


class _Plan:
    """The graph for one shape of inputs, up to the last value that is handed out."""

    def __init__(self, program: Program, sites: tuple[Site, ...], constants: Mapping[str, str]) -> None:
        self.program, self.sites, self.constants = program, sites, constants
        self.at = {node: [site for site in sites if site.node == node] for node in {s.node for s in sites}}
        self.ends = _ends(program.nodes)

    def run(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Iterator[tuple[Site, Tensor]]:
        device = _device(weights)
        arguments = [leaf for leaf in pytree.tree_leaves(as_call(inputs)) if isinstance(leaf, Tensor)]
        given = {name: leaf.to(device) for name, leaf in zip(self.program.inputs, arguments, strict=True)}
        env: dict[str, Any] = {}
        for place, node in enumerate(self.program.nodes):
            env[node.name] = _single(self._value(node, weights, given, env))
            for site in self.at.get(node.name, ()):
                yield site, site.read(env[node.name])
            for done in self.ends.get(place, ()):
                del env[done]

    def _value(
        self,
        node: fx.Node,
        weights: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        env: Mapping[str, Any],
    ) -> Any:
        if node.op == "placeholder":
            name = self.program.names.get(node.name, self.constants.get(node.name, ""))
            if name in weights:
                return weights[name].detach()
            return given[node.name] if node.name in given else self.program.values[node.name].detach()
        if node.op == "get_attr":
            return getattr(self.program.graph_module, str(node.target))
        # entered per call: what is between two values belongs to the caller
        with torch.no_grad(), own_random_numbers(given.values()) if is_random(node) else nullcontext():
            return _call(node, env)


def _make_plan(spec: WeightSpec, module: nn.Module, program: Program, everywhere: Collection[str]) -> _Plan:
    sites = find_sites(spec, program, type(module).__name__, everywhere)
    needed = _leading_to(program.nodes, {site.node for site in sites})
    names = {id(tensor): name for name, tensor in tensors_of(module).items()}
    constants = {node: names[id(tensor)] for node, tensor in program.values.items() if id(tensor) in names}
    return _Plan(replace(program, nodes=needed, outputs=()), sites, constants)


def _leading_to(nodes: tuple[fx.Node, ...], wanted: set[str]) -> tuple[fx.Node, ...]:
    needed: set[fx.Node] = {node for node in nodes if node.name in wanted}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return tuple(node for node in nodes if node in needed)


def _ends(nodes: tuple[fx.Node, ...]) -> dict[int, list[str]]:
    """After which node each value is read no more."""
    last = {node.name: place for place, node in enumerate(nodes)}
    for place, node in enumerate(nodes):
        last |= dict.fromkeys((source.name for source in node.all_input_nodes), place)
    ends: dict[int, list[str]] = {}
    for name, place in last.items():
        ends.setdefault(place, []).append(name)
    return ends


def _call(node: fx.Node, env: Mapping[str, Any]) -> Any:
    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return env[leaf.name]
        return _SINGLE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replaced)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _single(value: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.to(_SINGLE.get(leaf.dtype, leaf.dtype)) if isinstance(leaf, Tensor) else leaf, value
    )
