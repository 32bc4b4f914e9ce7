"""How much a network's answers depend on each of its parameters: the diagonal of the Fisher information."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._activations import check_runs, single
from weightspace.align._data import Batches, Loss, batches, call, runner, untied
from weightspace.errors import ConfigError, DataError
from weightspace.spec import Weights

Labels = Literal["sampled", "given"]


def fisher_information(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    data: Batches,
    *,
    labels: Labels = "sampled",
    loss: Loss = F.cross_entropy,
    seed: int = 0,
    chunk: int = 32,
) -> Weights:
    """The mean squared gradient of every parameter, one sample at a time.

    ``F = mean_x (d log p(y | x) / d weights)^2``. With labels that are sampled from the network's own softmax this
    is an unbiased estimate of the diagonal of the Fisher information; with the given ones it is the empirical
    Fisher, which vanishes where the network fits its labels.

    Args:
        module: computes logits, of shape (batch, ..., classes); a sample with several positions counts as one
            joint answer. It runs in evaluation mode, in float32 where weights are of half precision, and stays as it
            is.
        weights: a network of the module, under its ``state_dict`` names.
        data: batches of inputs and targets; the targets are used only if ``labels`` is ``"given"``.
        labels: ``"sampled"``, or ``"given"`` for the targets.
        loss: of outputs and targets, for given labels; any other loss than the cross-entropy goes, too.
        seed: of the labels.
        chunk: how many samples' gradients are held in memory together.

    Returns:
        For every parameter of the module a tensor of its shape and dtype, at least float32; tied ones under their
        first name, statistics and constants not at all.

    Raises:
        DataError: data that the module or the loss refuses, or outputs that are no logits.
        SpecError: a network without some of the module's tensors, or with others.
        ConfigError: a ``chunk`` below 1, or other ``labels``.

    Reference:
        Kunstner et al. 2019, "Limitations of the empirical Fisher approximation", arXiv:1905.12558.

    Example:
        >>> module = nn.Linear(1, 2, bias=False)
        >>> weights = {"weight": torch.zeros(2, 1)}  # p = 1/2, so that each gradient is 1/2 or -1/2 times x
        >>> fisher_information(module, weights, [(torch.tensor([[2.0]]), torch.tensor([0]))])["weight"]
        tensor([[1.],
                [1.]])
    """
    if chunk < 1:
        raise ConfigError(f"chunk: expected at least 1, found {chunk}")
    if labels not in get_args(Labels):
        raise ConfigError(f"labels: expected one of {', '.join(get_args(Labels))}, found {labels!r}")
    weights = untied(module, weights)
    check_runs(module, weights, data, loss if labels == "given" else None)
    device = next(iter(weights.values())).device
    network = runner(module).to(device)
    names = [name for name, _ in network.named_parameters() if name in weights]
    wide = {name: _widened(tensor) for name, tensor in weights.items()}
    parameters = {name: wide[name] for name in names}
    rest = {name: wide[name] for name, _ in network.named_buffers() if name in wide}
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    count = 0
    for inputs, targets in batches(data, device):
        for some, given in _chunks(_as_tuple(single(inputs)), targets, chunk):
            if labels == "sampled":
                given = _sampled(network, {**parameters, **rest}, some, generator)
            gradients = _gradients(
                network, parameters, rest, some, given, _negative if labels == "sampled" else loss
            )
            for name, gradient in gradients.items():
                total[name] += gradient.square().sum(0)
            count += len(given)
    return {name: tensor / max(count, 1) for name, tensor in total.items()}


def _widened(tensor: Tensor) -> Tensor:
    """Half precision as float32; without a graph."""
    tensor = tensor.detach()
    return (
        tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
    )


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _chunks(inputs: tuple[Any, ...], targets: Tensor, size: int) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    for start in range(0, len(inputs[0]), size):
        yield tuple(part[start : start + size] for part in inputs), targets[start : start + size]


def _sampled(
    network: nn.Module, weights: Weights, inputs: tuple[Any, ...], generator: torch.Generator
) -> Int[Tensor, "batch ..."]:
    """Labels drawn from the softmax; by one uniform number each, so that they are the same on every device."""
    with torch.no_grad():
        logits = call(network, weights, inputs)
    if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
        raise DataError("data: labels can be sampled from logits of shape (batch, ..., classes) alone")
    if logits.shape[-1] < 2:  # a softmax of one logit is 1, whatever the weights
        raise DataError(
            "data: labels can be sampled from logits of at least two classes, found one; labels='given' takes any loss"
        )
    upper = logits.double().softmax(-1).cumsum(-1)
    drawn = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float64).to(logits.device)
    return (upper < drawn[..., None]).sum(-1).clamp_max(logits.shape[-1] - 1)


def _negative(logits: Float[Tensor, "batch ... classes"], labels: Int[Tensor, "batch ..."]) -> Tensor:
    """The negative logarithm of the joint probability of a sample's labels."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def _gradients(
    network: nn.Module,
    parameters: Weights,
    rest: Weights,
    inputs: tuple[Any, ...],
    targets: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
) -> Weights:
    """The gradient of each sample's loss, one after another on the first axis."""

    def one(chosen: Weights, sample: tuple[Any, ...], target: Tensor) -> Tensor:
        single = tuple(part[None] for part in sample)
        return loss(call(network, {**chosen, **rest}, single), target[None])

    gradient = torch.func.grad(one)
    try:
        with warnings.catch_warnings():  # some operators are run sample by sample inside vmap
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return torch.func.vmap(gradient, in_dims=(None, 0, 0))(parameters, inputs, targets)
    except RuntimeError:  # a module with an operator that cannot be batched
        each = [
            gradient(parameters, tuple(part[row] for part in inputs), targets[row])
            for row in range(len(targets))
        ]
        return {name: torch.stack([found[name] for found in each]) for name in parameters}
