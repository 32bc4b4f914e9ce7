"""A module as a graph of ATen operators, and how to run that graph with other weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from weightspace.errors import SpecError

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
"""One tensor, a tuple of positional arguments, or a dict of keyword arguments."""

# where each batch norm takes its running mean and variance
_STATISTICS = {
    "batch_norm": (3, 4),
    "native_batch_norm": (3, 4),
    "cudnn_batch_norm": (3, 4),
    "instance_norm": (3, 4),
    "_native_batch_norm_legit": (3, 4),
    "_native_batch_norm_legit_functional": (3, 4),
    "_native_batch_norm_legit_no_training": (3, 4),
}
_HALF = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Program:
    """The graph of one call of a module.

    Args:
        graph_module: its ATen operators, without mutation.
        names: state dict name of the tensor behind a placeholder, one name for tied tensors.
        statistics: names of tensors that a batch norm uses as running statistics.
        values: tensors behind placeholders that are no parameters, under the placeholder's name: buffers and
            constants.
        inputs: names of the placeholders of the arguments, in order.
        outputs: the nodes whose values count, and the name of each in what the module returns.
        nodes: those on which the outputs depend, in order.
        text: dtype and shape of every input.
    """

    graph_module: fx.GraphModule
    names: Mapping[str, str]
    statistics: frozenset[str]
    values: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, fx.Node], ...]
    nodes: tuple[fx.Node, ...]
    text: str

    def run(
        self, weights: Mapping[str, Tensor], inputs: Inputs, *, everything: bool = False
    ) -> dict[str, Any]:
        """Values by node name, computed in float64: those of the outputs, or of all nodes.

        What the graph casts to a narrower floating type stays float64.

        Args:
            weights: tensors by the names in ``names``; what is missing is an error.
            inputs: the arguments.
            everything: whether to keep the values of all nodes.
        """
        arguments = [leaf for leaf in pytree.tree_leaves(as_call(inputs)) if isinstance(leaf, Tensor)]
        given = dict(zip(self.inputs, arguments, strict=True))
        env: dict[str, Any] = {}
        last_use = {} if everything else self._last_use()
        for place, node in enumerate(self.nodes):
            env[node.name] = _wide(self._value(node, weights, given, env))
            for done in last_use.get(place, ()):
                del env[done]
        return env

    def _last_use(self) -> dict[int, list[str]]:
        last: dict[str, int] = {}
        for place, node in enumerate(self.nodes):
            last |= dict.fromkeys((source.name for source in node.all_input_nodes), place)
        kept = {node.name for _, node in self.outputs}
        ends: dict[int, list[str]] = {}
        for name, place in last.items():
            if name not in kept:
                ends.setdefault(place, []).append(name)
        return ends

    def _value(
        self,
        node: fx.Node,
        weights: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        env: Mapping[str, Any],
    ) -> Any:
        if node.op == "placeholder":
            if node.name in self.names:
                return weights[self.names[node.name]]
            return given[node.name] if node.name in given else self.values[node.name]
        if node.op == "get_attr":
            return getattr(self.graph_module, str(node.target))
        return call(node, env)


def call(node: fx.Node, env: Mapping[str, Any], device: str | None = None) -> Any:
    """Run one operator on values by node name, with every floating type widened to float64."""

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return env[leaf.name]
        if device is not None and isinstance(leaf, torch.device):
            return torch.device(device)
        return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _HALF else leaf

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), replaced)
    # factories without a dtype make float32
    wide = "dtype" in _arguments(node) and kwargs.get("dtype") is None and _makes_floats(node)
    with torch.no_grad():
        return cast(Callable[..., Any], node.target)(
            *args, **({**kwargs, "dtype": torch.float64} if wide else kwargs)
        )


def _arguments(node: fx.Node) -> list[str]:
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments]


def _makes_floats(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not node.all_input_nodes and isinstance(value, Tensor) and value.is_floating_point()


def _wide(value: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.dtype in _HALF else leaf, value
    )


def beside(module: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs on the device where the module's parameters are."""
    device = next((tensor.device for tensor in module.state_dict(keep_vars=True).values()), None)
    if device is None:
        return inputs
    return cast(Inputs, pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs))


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def export(
    module: nn.Module, inputs: Inputs, outputs: Sequence[str] | None = None, known: Iterable[str] = ()
) -> Program:
    """Trace one call of a module in evaluation mode; nothing is allocated and the module is not changed.

    Args:
        module: the network, on any device, the meta device included.
        inputs: example arguments.
        outputs: names (or positions, as text) of what counts in what it returns; everything by default.
        known: names of operators that have a rule; others are decomposed where PyTorch knows how.

    Raises:
        SpecError: the module does not accept the inputs or cannot be exported, or an output has no such name.
    """
    args, kwargs = as_call(beside(module, inputs))
    with _mode(module, training=False), _silence(), torch.no_grad():
        exported = _exported(module, args, kwargs, set(known))
        updated = _updated_in_training(module, args, kwargs, set(_statistics_of(exported)))
    signature = exported.graph_signature
    first = _first_names(module)
    graph = exported.graph
    names = {
        node: first.get(target, target)
        for node, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()
    }
    estimated = {*_statistics_of(exported), *updated}
    statistics = frozenset(first.get(name, name) for name in estimated)
    trained = {first.get(name, name) for name in signature.inputs_to_parameters.values()}
    moving = {node: name for node, name in names.items() if name in trained or name in statistics}
    values = {
        node: exported.state_dict[target] if target in exported.state_dict else exported.constants[target]
        for node, target in {
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }.items()
        if node not in moving
    }
    results = _outputs(exported, outputs)
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    hidden = {*signature.inputs_to_lifted_custom_objs, *names, *values}
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    user = [name for name in signature.user_inputs if isinstance(name, str) and name in placeholders]
    return Program(
        graph_module=exported.graph_module,
        names=moving,
        statistics=statistics,
        values=values,
        inputs=tuple(name for name in user if name not in hidden)[: len(leaves)],
        outputs=results,
        nodes=tuple(_reaching(graph, [node for _, node in results])),
        text=", ".join(f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" for leaf in leaves),
    )


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: set[str]
) -> torch.export.ExportedProgram:
    try:
        exported = torch.export.export(module, args, kwargs, strict=False).run_decompositions({})
    except Exception as error:
        raise SpecError(
            f"module: {type(module).__name__} cannot be exported with these inputs: {_cause(error)}; "
            "describe it by hand with WeightSpec.build"
        ) from error
    table = torch.export.default_decompositions() if known else {}
    tried: set[Any] = set()
    while wanted := {
        target: table[target] for target in _without_rule(exported, known) - tried if target in table
    }:
        exported = exported.run_decompositions(wanted)
        tried.update(wanted)
    _check_sizes(module, exported)
    return exported


def _check_sizes(module: nn.Module, exported: torch.export.ExportedProgram) -> None:
    """Raise SpecError where the size of a value depends on the values of others."""
    for node in exported.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.SymInt) or (
                isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)
            ):
                raise SpecError(
                    f"module: {type(module).__name__} makes a tensor whose size depends on data ({operator_name(node)}); "
                    "describe it by hand with WeightSpec.build"
                )


def _without_rule(exported: torch.export.ExportedProgram, known: set[str]) -> set[Any]:
    nodes = (node for node in exported.graph.nodes if node.op == "call_function")
    return {node.target for node in nodes if operator_name(node) not in known}


def _cause(error: BaseException) -> str:
    """The first line of what PyTorch says, and the user's line that it blames."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next((line for line in lines if line.startswith("File ") and "site-packages" not in line), "")
    if not where:
        blamed = [
            frame
            for frame in _frames(error)
            if "site-packages" not in frame and "weightspace/spec" not in frame
        ]
        where = blamed[-1] if blamed else ""
    text = lines[0] if lines else type(error).__name__
    return f"{text} ({where})" if where and where not in text else text


def _frames(error: BaseException) -> list[str]:
    frames, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith("<"):
            frames.append(f"File {code.co_filename}, line {trace.tb_lineno}, in {code.co_name}")
        trace = trace.tb_next
    return frames


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Every part of the module in one mode, and afterwards in its own again."""
    before = [(child, child.training) for child in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for child, mode in before:
            child.training = mode


@contextmanager
def _silence() -> Iterator[None]:
    """Neither warnings nor the lines that PyTorch logs and prints before it raises what we report ourselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_names(module: nn.Module) -> dict[str, str]:
    """For every name of a parameter or buffer, the first name of the same tensor."""
    seen: dict[int, str] = {}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return {name: seen.setdefault(id(tensor), name) for name, tensor in named}


def _statistics_of(exported: torch.export.ExportedProgram) -> Iterator[str]:
    """Names of the buffers that batch norms use as running statistics."""
    buffers = exported.graph_signature.inputs_to_buffers
    for node in exported.graph.nodes:
        for slot in _STATISTICS.get(operator_name(node), ()):
            argument = node.args[slot] if slot < len(node.args) else None
            if isinstance(argument, fx.Node) and argument.name in buffers:
                yield buffers[argument.name]


def _updated_in_training(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: set[str]
) -> set[str]:
    """Names of other floating buffers that a call in training mode changes, such as those of a spectral norm.

    They belong to the weights, as running statistics do. One more export, of modules that store such buffers.
    """
    stored = module.state_dict(keep_vars=True)
    others = {
        name
        for name, buffer in module.named_buffers()
        if name in stored and buffer.is_floating_point() and name not in known
    }
    if not others:
        return set()
    with _mode(module, training=True):
        try:
            exported = torch.export.export(module, args, kwargs, strict=False).run_decompositions({})
        except Exception:  # batch norms refuse a single item in training mode, and so on: nothing is known
            return set()
    return others & set(exported.graph_signature.buffers_to_mutate.values())


def operator_name(node: fx.Node) -> str:
    """Name of an ATen operator without its overload, ``"linear"``; of others, whatever identifies them."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    return str(schema.name).removeprefix("aten::")


def _outputs(
    exported: torch.export.ExportedProgram, wanted: Sequence[str] | None
) -> tuple[tuple[str, fx.Node], ...]:
    returned = next(node for node in reversed(exported.graph.nodes) if node.op == "output").args[0]
    mutated = len(returned) - exported.call_spec.out_spec.num_leaves
    tree = pytree.tree_unflatten(list(returned[mutated:]), exported.call_spec.out_spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    found = tuple((_path(path), node) for path, node in paths if isinstance(node, fx.Node))
    if wanted is None:
        return found
    known = {name.split(".")[0] for name, _ in found}
    for name in wanted:
        if name not in known:
            raise SpecError(f"outputs: the module returns {', '.join(sorted(known))}, found {name!r}")
    return tuple((name, node) for name, node in found if name.split(".")[0] in wanted)


def _path(keys: Sequence[Any]) -> str:
    return (
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys)
        or "0"
    )


def _reaching(graph: fx.Graph, outputs: Sequence[fx.Node]) -> list[fx.Node]:
    needed = set(outputs)
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in needed]
