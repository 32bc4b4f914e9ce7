"""Specs of known architectures, written down by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weightspace.errors import SpecError
from weightspace.spec._types import Exponent, Group, Scaling, ScalingKind, TensorSpec, WeightSpec

# what each activation's units may be multiplied by: (kind, power on incoming, power on outgoing)
_SYMMETRY: dict[str, tuple[ScalingKind, int, int] | None] = {
    "relu": ("positive", 1, -1),
    "leaky_relu": ("positive", 1, -1),
    "tanh": ("sign", 1, 1),
    "sine": ("sign", 1, 1),
    "gaussian": ("sign", 1, 0),  # even: the sign of what enters is lost
    "gelu": None,
    "sigmoid": None,
    "silu": None,
}


def mlp_spec(
    widths: Sequence[int],
    *,
    activation: str = "relu",
    w0: float = 1.0,
    layers: Sequence[str] | None = None,
    bias: bool = True,
) -> WeightSpec:
    """The spec of a multilayer perceptron: one group per hidden layer, input and output fixed.

    A hidden layer of one unit is a group as well: there is nothing to permute, but its scalings are symmetries like
    any other. :func:`weightspace.spec.trace` cannot tell an axis of size 1 from none, and leaves both out; so for
    such widths the two specs differ, and both are right.

    Args:
        widths: units per layer, input and output included.
        activation: of the hidden layers; it decides the scalings (ReLU: positive; tanh and sine: sign;
            sine: phase as well; Gaussian: sign of the incoming weights alone).
        w0: frequency of ``sin(w0 (W x + b))``; a phase step shifts the bias by ``pi / w0``.
        layers: names of the linear layers in order; ``layers.0``, ``layers.1``, ... by default.
        bias: whether the layers have biases.

    Raises:
        SpecError: fewer than two widths, an unknown activation, or a wrong number of layer names.

    Example:
        >>> mlp_spec([2, 32, 32, 1], activation="sine", w0=30.0).num_parameters
        1185
    """
    depth = len(widths) - 1
    names = list(layers) if layers is not None else [f"layers.{index}" for index in range(depth)]
    if depth < 1 or len(names) != depth:
        raise SpecError(f"mlp: {len(widths)} widths need {max(depth, 1)} layer names, found {len(names)}")
    if activation not in _SYMMETRY:
        raise SpecError(f"activation: expected one of {', '.join(_SYMMETRY)}, found {activation!r}")
    if activation == "sine" and not w0 > 0:
        raise SpecError(f"w0: expected a positive frequency, found {w0}")
    group_names = [None, *(f"hidden{index}" for index in range(depth - 1)), None]
    groups = [
        Group(name, width, (), activation)
        for name, width in zip(group_names, widths, strict=True)
        if name is not None
    ]
    tensors: dict[str, TensorSpec] = {}
    for index, name in enumerate(names):
        incoming, outgoing = group_names[index], group_names[index + 1]
        shape = (widths[index + 1], widths[index])
        tensors[f"{name}.weight"] = TensorSpec.dense(shape, [outgoing, incoming])
        if bias:
            tensors[f"{name}.bias"] = TensorSpec.dense(shape[:1], [outgoing])
    scalings = [
        scaling
        for index, group in enumerate(groups)
        for scaling in _scalings(group, names[index : index + 2], tensors, w0)
    ]
    return WeightSpec.build(groups, tensors, scalings)


def _scalings(
    group: Group, layers: Sequence[str], tensors: dict[str, TensorSpec], w0: float
) -> list[Scaling]:
    """Scalings of one hidden layer that is fed by the first of ``layers`` and read by the second."""
    assert group.activation is not None
    symmetry = _SYMMETRY[group.activation]
    if symmetry is None:
        return []
    kind, incoming_power, outgoing_power = symmetry
    weight, bias, reader = f"{layers[0]}.weight", f"{layers[0]}.bias", f"{layers[1]}.weight"
    entering = [name for name in (weight, bias) if name in tensors]
    # the group's dim is the first of the tensors that feed it, and the last of the one that reads it
    outgoing = Exponent(reader, 0, len(tensors[reader].cells[0].dims) - 1, outgoing_power)
    exponents = [Exponent(name, 0, 0, incoming_power) for name in entering]
    if outgoing_power:
        exponents.append(outgoing)
    found = [Scaling(f"{kind}({group.name})", group.name, kind, tuple(exponents))]
    if group.activation == "sine" and bias in tensors:
        shifts = (Exponent(bias, 0, 0, 1),)
        found.append(Scaling(f"phase({group.name})", group.name, "phase", (outgoing,), shifts, math.pi / w0))
    return found
