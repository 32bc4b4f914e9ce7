"""Norms that run for whole populations under ``torch.vmap``, in training as well."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.errors import ConfigError

Norm = Literal["none", "batch", "layer"]
NORMS: tuple[str, ...] = get_args(Norm)


class BatchNorm(nn.Module):
    """Batch normalisation of axis 1, which *replaces* its running statistics instead of writing into them.

    ``y = weight (x - mean) / sqrt(var + eps) + bias``, with the batch's mean and (biased) variance in training
    and the running ones otherwise. A training step sets ``running = (1 - momentum) running + momentum batch``, the
    variance unbiased, as ``nn.BatchNorm2d`` does; but as new tensors, so that ``torch.func.functional_call`` leaves
    them in the dictionary that it was given, and the layer runs under ``torch.vmap`` and ``torch.func.grad``.
    :func:`forward_and_statistics` hands them out. There is no ``num_batches_tracked``.

    Args:
        channels: size of axis 1.
        momentum: weight of the newest batch.
        eps: added to the variance.

    Raises:
        ConfigError: in training under ``vmap`` with parameters that are batched and statistics that are not.

    Reference:
        Ioffe and Szegedy 2015, "Batch Normalization", arXiv:1502.03167, algorithm 1.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.momentum, self.eps = channels, momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch channels *size"]:
        """Normalise."""
        if self.training:
            normal = F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
            self._follow(x)
            return normal
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def _follow(self, x: Tensor) -> None:
        with torch.no_grad():
            axes = [axis for axis in range(x.ndim) if axis != 1]
            variance, mean = torch.var_mean(x.detach(), axes)
            self.running_mean = self._moved(self.running_mean, mean)
            self.running_var = self._moved(self.running_var, variance)

    def _moved(self, running: Tensor, batch: Tensor) -> Tensor:
        moved = torch.lerp(running, batch.to(running.dtype), self.momentum)
        try:
            # Refused where the new statistics are batched and the old are not: they would stay in the module.
            return torch.empty_like(running).copy_(moved)
        except RuntimeError:
            raise ConfigError(
                "running_mean: expected statistics batched like the parameters, found those of one network; "
                "pass them too, as evaluate_batch does"
            ) from None

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.channels}, momentum={self.momentum}, eps={self.eps}"


def norm_layer(norm: str, channels: int) -> nn.Module:
    """A norm by name: ``"layer"`` is layer normalisation over channels and space, affine per channel."""
    if norm == "batch":
        return BatchNorm(channels)
    return nn.GroupNorm(1, channels) if norm == "layer" else nn.Identity()


def statistic_names(module: nn.Module) -> tuple[str, ...]:
    """Names, in the state dict, of the running statistics that :class:`BatchNorm` layers keep.

    Example:
        >>> statistic_names(nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm(4)))
        ('1.running_mean', '1.running_var')
    """
    layers = [name for name, layer in module.named_modules() if isinstance(layer, BatchNorm)]
    return tuple(
        f"{name}.{statistic}" if name else statistic
        for name in layers
        for statistic in ("running_mean", "running_var")
    )
