"""What training and users call: normalisation and model in one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightspace.datasets import Normalisation
from weightspace.spec import Weights, WeightSpec, cell_view


class Metanetwork(nn.Module):
    """Normalisation and model: raw weights in, outputs out.

    Args:
        model: reads normalised weights with one batch axis, and beside them the raw ones if it has ``takes_raw``.
        normalisation: of the training split; None for models that read raw weights.
    """

    def __init__(self, model: nn.Module, normalisation: Normalisation | None) -> None:
        super().__init__()
        self.model, self.normalisation = model, normalisation

    def forward(self, weights: Weights) -> Tensor | Weights:
        """Read a batch of networks."""
        beside = {"raw": weights} if getattr(self.model, "takes_raw", False) else {}
        read = weights if self.normalisation is None else self.normalisation(weights)
        out: Tensor | Weights = self.model(read, **beside)
        return out


class ResidualMetanetwork(Metanetwork):
    """Edits weights: ``W + s * std * model(normalised W)``, with learned scales ``s``.

    The standard deviations are those of the normalisation, so that one initial scale suits all tensors. There is one
    scale for every set of parameters that no symmetry tells apart (of a layer's weight one per input that is fixed,
    of a hidden bias one), so the sum is equivariant whenever the model is: ``edit(g . W) == g . edit(W)``.

    Args:
        model: weights in, weights out.
        normalisation: of the training split.
        spec: the weight space.
        scale: all scales at the start.

    Shapes:
        Weights with one batch axis -> weights of the same shapes, float32.
    """

    kinds: Tensor

    def __init__(
        self, model: nn.Module, normalisation: Normalisation | None, spec: WeightSpec, scale: float
    ) -> None:
        super().__init__(model, normalisation)
        kinds, count = _kinds(spec)
        self.spec = spec
        self.register_buffer("kinds", kinds, persistent=False)
        self.scales = nn.Parameter(torch.full((count,), scale))

    def forward(self, weights: Weights) -> Weights:
        """Edit a batch of networks."""
        scales = self.spec.unflatten(self.scales[self.kinds])
        change = super().forward(weights)
        assert not isinstance(change, Tensor)
        if self.normalisation is not None:
            change = self.normalisation.restore_change(change)
        return {name: w + scales[name] * change[name].float() for name, w in weights.items()}


def _kinds(spec: WeightSpec) -> tuple[Tensor, int]:
    """Number of the scale of every parameter, (parameters,) int64, and how many scales there are."""
    parts, count = [], 0
    for tensor in spec.tensors.values():
        kinds = torch.zeros(1, tensor.numel, dtype=torch.int64)
        for cell in tensor.cells:
            fixed = [dim.size if dim.group is None else 1 for dim in cell.dims]
            numbers = count + torch.arange(torch.Size(fixed).numel()).reshape(fixed)
            cell_view(kinds, cell)[0] = numbers.expand(cell.sizes)
            count += numbers.numel()
        parts.append(kinds[0])
    return torch.cat(parts), count
