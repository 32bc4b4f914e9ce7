"""From the shapes in a state dict to the weight space that they are a point of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from weightspace.errors import DataError, WeightspaceError
from weightspace.nets import ACTIVATIONS, build
from weightspace.spec import Cell, Dim, Group, TensorSpec, WeightSpec
from weightspace.zoo._architectures import spec_of
from weightspace.zoo.transfer._listing import natural

Shapes = Mapping[str, tuple[int, ...]]
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Design:
    """What all networks of a population have in common.

    Args:
        spec: their weight space.
        tensors: names in their files, in the order of the spec.
        architecture: JSON for ``nets.build``; None for what it cannot build.
        protocol: what the format, and the options, say of them.
        name: a beginning for that of the population.
    """

    spec: WeightSpec
    tensors: tuple[str, ...]
    architecture: Mapping[str, Any] | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    name: str = "networks"


ACTIVATION_NAMES = {
    **{name: name for name in ACTIVATIONS},
    "sin": "sine",
    "siren": "sine",
    "swish": "silu",
    "leakyrelu": "leaky_relu",
    "leaky-relu": "leaky_relu",
    "gauss": "gaussian",
}


def activation_name(text: Any) -> str | None:
    """One of ours, however a file spells it; None for one that we do not have.

    Example:
        >>> activation_name("ReLU"), activation_name("swish"), activation_name("mish")
        ('relu', 'silu', None)
    """
    return ACTIVATION_NAMES.get(str(text).strip().lower())


def mlp_design(shapes: Shapes, activation: str, w0: float, output_offset: float) -> Design:
    """A multilayer perceptron, from the shapes of its weights (out, in), whatever its tensors are called.

    Layers are taken in the natural order of their names; axes of size 1 before the two are ignored.

    Raises:
        DataError: the shapes are not those of one.

    Example:
        >>> mlp_design({"seq.0.weight": (8, 2), "seq.0.bias": (8,), "seq.1.weight": (1, 8), "seq.1.bias": (1,)},
        ...     "sine", 30.0, 0.5).architecture["arguments"]["widths"]
        [2, 8, 1]
    """
    layers = chain(shapes)
    plain = {name: _two(name, shapes[f"{name}.weight"]) for name in layers}
    widths = [plain[layers[0]][1], *(out for out, _ in plain.values())]
    for (before, (out, _)), (name, (_, into)) in pairwise(plain.items()):
        if out != into:
            raise DataError(f"{name}.weight reads {into} units, but {before}.weight has {out}: not an MLP")
    for name, (out, _) in plain.items():
        bias = shapes.get(f"{name}.bias")
        if bias is None or _size(bias) != out or bias[-1] != out:
            raise DataError(
                f"{name}.bias: expected shape [{out}], found {None if bias is None else list(bias)}"
            )
    arguments = {"widths": widths, "activation": activation, "w0": w0, "output_offset": output_offset}
    return built(
        {"kind": "mlp", "arguments": arguments}, {f"layers.{at}": name for at, name in enumerate(layers)}
    )


def built(architecture: Mapping[str, Any], layers: Mapping[str, str], name: str | None = None) -> Design:
    """The design of one of our networks; ``layers`` says what each of its layers is called in the file.

    Raises:
        DataError: the description makes no network.
    """
    try:
        network = build(architecture)
        spec = spec_of(network)
    except WeightspaceError as error:
        raise DataError(f"its shapes make no network ({error})") from None
    tensors = []
    for tensor in spec.tensors:
        layer, _, leaf = tensor.rpartition(".")
        tensors.append(f"{layers[layer]}.{leaf}" if layer in layers else tensor)
    kept = {"kind": architecture["kind"], "arguments": network.arguments()}
    return Design(spec, tuple(tensors), kept, name=name or str(architecture["kind"]))


def fixed_design(shapes: Shapes) -> Design:
    """Tensors of which nothing is known to move: no symmetry is claimed."""
    tensors = {
        name: TensorSpec.dense(
            shape, [None] * len(shape), "statistic" if name.endswith(STATISTICS) else "parameter"
        )
        for name, shape in sorted(shapes.items(), key=lambda entry: natural(entry[0]))
    }
    protocol = {"symmetries": "none are claimed: the files do not say how the network is built"}
    return Design(WeightSpec.build([], tensors), tuple(tensors), None, protocol)


def chain_design(shapes: Shapes, layers: Sequence[str] | None = None) -> Design:
    """Convolutions and linear layers one after the other, with pooling and one activation somewhere between.

    Claims the permutations of channels and units, which hold wherever it pools, and no scalings, which may not.

    Args:
        shapes: of all tensors.
        layers: their order; by default the natural one of their names.

    Raises:
        DataError: the shapes are not those of a chain.
    """
    layers = chain(shapes) if layers is None else layers
    groups: list[Group] = []
    tensors: dict[str, TensorSpec] = {}
    for at, name in enumerate(layers):
        shape = shapes[f"{name}.weight"]
        before = groups[-1] if groups else None
        after = Group(f"hidden{at}", shape[0]) if at < len(layers) - 1 else None
        tensors[f"{name}.weight"] = _reading(f"{name}.weight", shape, before, after)
        if f"{name}.bias" in shapes:
            if shapes[f"{name}.bias"] != shape[:1]:
                raise DataError(
                    f"{name}.bias: expected shape {list(shape[:1])}, found {list(shapes[f'{name}.bias'])}"
                )
            tensors[f"{name}.bias"] = TensorSpec.dense(shape[:1], [after.name if after else None])
        groups += [after] if after else []
    protocol = {
        "symmetries": "permutations of channels and units; no scalings: the files do not say where the network pools"
    }
    return Design(WeightSpec.build(groups, tensors), tuple(tensors), None, protocol)


def _reading(name: str, shape: tuple[int, ...], before: Group | None, after: Group | None) -> TensorSpec:
    """A weight (out, in, ...) that reads the units of a group, each of which may have been flattened to several."""
    names = (after.name if after else None, before.name if before else None)
    if before is None or shape[1] == before.size:
        return TensorSpec.dense(shape, [*names, *[None] * (len(shape) - 2)])
    pixels, rest = divmod(shape[1], before.size)
    if rest or len(shape) != 2:
        raise DataError(
            f"{name} reads {shape[1]} units, but the layer before has {before.size}: not a chain of layers"
        )
    dims = (Dim(0, shape[1], shape[0], names[0]), Dim(1, pixels, before.size, names[1]), Dim(1, 1, pixels))
    return TensorSpec(shape, (Cell(tuple(dim for dim in dims if dim.group is not None or dim.size > 1)),))


def chain(shapes: Shapes) -> list[str]:
    """The names of the layers, in their natural order.

    Raises:
        DataError: something else than weights and biases, or nothing.
    """
    for name in shapes:
        if not name.endswith((".weight", ".bias")):
            raise DataError(f"{name}: expected tensors called *.weight and *.bias")
    layers = sorted({name.rpartition(".")[0] for name in shapes}, key=natural)
    missing = [name for name in layers if f"{name}.weight" not in shapes or len(shapes[f"{name}.weight"]) < 2]
    if not layers or missing:
        raise DataError(f"{missing[0]}.weight: expected a weight with two axes" if missing else "no tensors")
    return layers


def _two(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if _size(shape[:-2]) != 1:
        raise DataError(f"{name}.weight: expected shape (out, in), found {list(shape)}")
    return shape[-2], shape[-1]


def _size(shape: Sequence[int]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size
