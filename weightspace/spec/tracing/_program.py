"""A module as a graph of ATen operators, and how to run that graph with other weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, TensorArgument

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
_WIDER = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}
_DEPENDS_ON_DATA = ("data-dependent", "DataDependent", "UnbackedSymInt")  # in PyTorch's words
_SEED = 0  # of the numbers that a module draws: equal in every run


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

        What the graph casts to a narrower floating type stays float64. Random operators draw the same numbers
        in every run.

        Args:
            weights: tensors by the names in ``names``; what is missing is an error.
            inputs: the arguments.
            everything: whether to keep the values of all nodes.
        """
        arguments = [leaf for leaf in pytree.tree_leaves(as_call(inputs)) if isinstance(leaf, Tensor)]
        given = dict(zip(self.inputs, arguments, strict=True))
        env: dict[str, Any] = {}
        last_use = {} if everything else self._last_use()
        with own_random_numbers(weights.values()) if any(map(is_random, self.nodes)) else nullcontext():
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
        return _WIDER.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

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
        lambda leaf: leaf.to(_WIDER.get(leaf.dtype, leaf.dtype)) if isinstance(leaf, Tensor) else leaf, value
    )


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers with the arguments that it has."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    training = {argument(node, name) for name in ("train", "training") if name in _arguments(node)}
    rates = {argument(node, name) for name in ("dropout", "dropout_p") if name in _arguments(node)}
    return False not in training and rates != {0.0}


@contextmanager
def own_random_numbers(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Draw the same random numbers each time on the devices of some tensors; the user's generators stay as they are."""
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        # torch.manual_seed would seed devices that are not restored
        torch.default_generator.manual_seed(_SEED)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(_SEED)
        yield


def argument(node: fx.Node, name: str) -> Any:
    """One argument of an operator by name, or its default; None if the operator has no such argument."""
    names = _arguments(node)
    if name not in names:
        return None
    place = names.index(name)
    default = node.target._schema.arguments[place]  # type: ignore[union-attr]
    given = node.kwargs.get(name, default.default_value if default.has_default_value() else None)
    return node.args[place] if place < len(node.args) else given


def beside(module: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs on the device where the module's parameters are."""
    device = next((tensor.device for tensor in tensors_of(module).values()), None)
    if device is None:
        return inputs
    return cast(Inputs, pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without what modules of other kinds (quantised ones) store in it beside tensors."""
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def export(
    module: nn.Module,
    inputs: Inputs,
    outputs: str | Sequence[str | int] | None = None,
    known: Iterable[str] = (),
) -> Program:
    """Trace one call of a module in evaluation mode; nothing is allocated and the module is not changed.

    Args:
        module: the network, on any device, the meta device included.
        inputs: example arguments.
        outputs: names or positions of what counts in what it returns; everything by default.
        known: names of operators that have a rule; others are decomposed where PyTorch knows how.

    Raises:
        SpecError: the module does not accept the inputs or cannot be exported, or an output has no such name.
    """
    args, kwargs = as_call(beside(module, inputs))
    first = first_names(module)
    stored = tensors_of(module).values()
    with _mode(module, training=False), _silence(), torch.no_grad(), own_random_numbers(stored):
        exported = _exported(module, args, kwargs, set(known))
        updated = _updated_in_training(module, args, kwargs, set(_statistics_of(exported)))
    signature = exported.graph_signature
    graph = exported.graph
    names = {
        node: first.get(target, target)
        for node, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()
    }
    estimated = {*_statistics_of(exported), *updated}
    statistics = frozenset(first.get(name, name) for name in estimated)
    trained = {first.get(name, name) for name in signature.inputs_to_parameters.values()}
    empty = {name for name, tensor in exported.state_dict.items() if not tensor.numel()}
    moving = {
        node: name
        for node, name in names.items()
        if (name in trained or name in statistics) and name not in empty
    }
    values = {
        node: exported.state_dict[target] if target in exported.state_dict else exported.constants[target]
        for node, target in {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }.items()
        if node not in moving
    }
    results = _outputs(exported, _wanted(outputs))
    _check_outputs(module, results)
    return Program(
        graph_module=exported.graph_module,
        names=moving,
        statistics=statistics,
        values=values,
        inputs=tuple(
            spec.arg.name
            for spec in signature.input_specs
            if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
        ),
        outputs=results,
        nodes=tuple(_reaching(graph, [node for _, node in results])),
        text=_text((args, kwargs)),
    )


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], known: set[str]
) -> torch.export.ExportedProgram:
    try:
        exported = torch.export.export(module, args, kwargs, strict=False).run_decompositions({})
        table = torch.export.default_decompositions() if known else {}
        tried: set[Any] = set()
        while wanted := {
            target: table[target] for target in _without_rule(exported, known) - tried if target in table
        }:
            exported = exported.run_decompositions(wanted)
            tried.update(wanted)
    except Exception as error:
        cause = _cause(error)
        depends = any(word in f"{type(error).__name__} {error}" for word in _DEPENDS_ON_DATA)
        advice = "describe it by hand with WeightSpec.build" if depends else f"found {_text((args, kwargs))}"
        raise SpecError(
            f"module: {type(module).__name__} cannot be exported with these inputs: {cause}; {advice}"
        ) from error
    return exported


def _text(inputs: object) -> str:
    """Dtype and shape of every tensor."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    texts = (f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" for leaf in leaves)
    return ", ".join(texts) or "no tensors"


def is_unsized(node: fx.Node) -> bool:
    """Whether the size of a value depends on the values of others."""
    return any(
        isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
        or (isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape))
        for value in pytree.tree_leaves(node.meta.get("val"))
    )


def _check_outputs(module: nn.Module, outputs: Iterable[tuple[str, fx.Node]]) -> None:
    """Raise SpecError where the size of an output depends on data, or all outputs are empty."""
    values = [(name, node, node.meta.get("val")) for name, node in outputs]
    for name, node, _ in values:
        if is_unsized(node):
            raise SpecError(
                f"module: the size of output {name} of {type(module).__name__} depends on data ({operator_name(node)}); "
                "describe it by hand with WeightSpec.build"
            )
    if values and all(isinstance(value, Tensor) and not value.numel() for _, _, value in values):
        raise SpecError(
            f"inputs: the outputs of {type(module).__name__} are empty; expected sizes of at least 1"
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
    text = lines[0].rstrip(".") if lines else type(error).__name__
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
    for child, _ in before:
        # not child.train(), which some modules override to change their weights
        child.training = training
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


def first_names(module: nn.Module) -> dict[str, str]:
    """For every name of a parameter or buffer, the first name of the same tensor, or of the same memory.

    Raises:
        SpecError: parameters share a part of their memory only.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    seen: dict[object, str] = {}
    found = {}
    for name, tensor in [*parameters.items(), *module.named_buffers(remove_duplicate=False)]:
        first = seen.setdefault(id(tensor), name)
        found[name] = seen.setdefault(_memory(tensor), first) if _memory(tensor) else first
    _check_memory({name: tensor for name, tensor in parameters.items() if found[name] == name})
    return found


def _memory(tensor: Tensor) -> tuple[object, ...] | None:
    """Which elements of memory a tensor holds; None if it holds none of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    if tensor.device.type == "meta" or not tensor.numel():
        return None
    start = tensor.untyped_storage().data_ptr()
    return (tensor.device, start, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())


def _check_memory(parameters: Mapping[str, Tensor]) -> None:
    alike: dict[object, list[str]] = {}
    for name, tensor in parameters.items():
        if _memory(tensor):
            alike.setdefault((tensor.device, tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(
                name
            )
    for names in alike.values():
        if len(names) > 1:
            _check_apart([(name, parameters[name]) for name in names])


def _check_apart(sharing: Sequence[tuple[str, Tensor]]) -> None:
    """Raise SpecError where an element of one storage belongs to two tensors."""
    first = sharing[0][1]
    owners = torch.full((first.untyped_storage().nbytes() // first.element_size(),), -1, dtype=torch.int32)
    for place, (name, tensor) in enumerate(sharing):
        once = [1 if step == 0 else size for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
        region = owners.as_strided(once, tensor.stride(), tensor.storage_offset())
        other = int(region.max())
        if other >= 0:
            raise SpecError(
                f"module: parameters {sharing[other][0]!r} and {name!r} share a part of their memory; expected "
                "all of it with the same shape, or none"
            )
        region.fill_(place)


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
    stored = tensors_of(module)
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


def _wanted(outputs: object) -> list[str] | None:
    if outputs is None:
        return None
    names = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | int) for name in names):
        raise SpecError(f"outputs: expected a name, or a list of names or positions, found {outputs!r}")
    return [str(name) for name in names]


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
