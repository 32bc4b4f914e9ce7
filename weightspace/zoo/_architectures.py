"""From a module to the spec of its weight space, for the architectures whose spec is known."""

from __future__ import annotations

from torch import nn

from weightspace.errors import SpecError
from weightspace.nets import MLP
from weightspace.spec import WeightSpec

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
}


def spec_of(module: nn.Module) -> WeightSpec:
    """The spec of a built-in network, or of an ``nn.Sequential`` of linear layers and one activation.

    Raises:
        SpecError: any other module; pass ``spec=`` for those.

    Example:
        >>> spec_of(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))).groups["hidden0"].activation
        'relu'
    """
    if isinstance(module, MLP):
        return WeightSpec.mlp(module.widths, activation=module.activation, w0=module.w0)
    if type(module) is nn.Sequential:
        return _sequential_spec(module)
    raise SpecError(f"module: no spec is known for {type(module).__name__}; describe it and pass spec=")


def _sequential_spec(module: nn.Sequential) -> WeightSpec:
    layers = [(name, child) for name, child in module.named_children() if isinstance(child, nn.Linear)]
    rest = [child for child in module if not isinstance(child, nn.Linear | nn.Flatten | nn.Dropout)]
    unknown = [child for child in rest if type(child) not in _ACTIVATIONS]
    if unknown:
        raise SpecError(f"module: no rule for {type(unknown[0]).__name__} in nn.Sequential; pass spec=")
    kinds = {_ACTIVATIONS[type(child)] for child in rest}
    linear = [
        isinstance(child, nn.Linear) for child in module if not isinstance(child, nn.Flatten | nn.Dropout)
    ]
    alternating = [at % 2 == 0 for at in range(2 * len(layers) - 1)]
    if not layers or len(kinds) > 1 or linear != alternating:
        raise SpecError(
            "module: expected linear layers with one and the same activation between each two of them, "
            f"found {', '.join(type(child).__name__ for child in module)}; pass spec="
        )
    if len({layer.bias is None for _, layer in layers}) > 1:
        raise SpecError("module: expected biases on all linear layers or on none; pass spec=")
    widths = [layers[0][1].in_features, *(layer.out_features for _, layer in layers)]
    return WeightSpec.mlp(
        widths,
        activation=kinds.pop() if kinds else "relu",
        layers=[name for name, _ in layers],
        bias=layers[0][1].bias is not None,
    )
