"""How far networks are from one another as functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.align._data import Batches, batches
from weightspace.align.judging._path import check_networks, check_suits, class_axis, on_device, outputs_of
from weightspace.errors import DataError, SpecError

_DIVERGENCES = ("disagreement", "symmetric_kl", "jensen_shannon")


@dataclass(frozen=True, eq=False)
class FunctionalDistance:
    """How far two networks are from one another on data; one entry per network B where there are many.

    Args:
        mean_squared: mean squared difference of outputs, over samples and entries.
        relative: L2 distance of all outputs, over the L2 norm of those of A; infinite where A gives only zeros.
        disagreement: share of predictions that differ, in [0, 1]; None where targets are no classes, as the next two.
        symmetric_kl: ``(KL(p || q) + KL(q || p)) / 2`` of the softmax of outputs, mean over predictions, in nats.
        jensen_shannon: ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``, in nats, at most ln 2.
        samples: on which they were compared.
    """

    mean_squared: Float[Tensor, "*batch"]
    relative: Float[Tensor, "*batch"]
    disagreement: Float[Tensor, "*batch"] | None
    symmetric_kl: Float[Tensor, "*batch"] | None
    jensen_shannon: Float[Tensor, "*batch"] | None
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes None."""
        fields = vars(self).items()
        return {name: _plain(value) if isinstance(value, Tensor) else value for name, value in fields}

    def to_json(self) -> str:
        """An entry per field."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def summary(self) -> str:
        """One line; means over the networks when there are many."""
        parts = [f"relative L2 distance of outputs {float(self.relative.mean()):.4g}"]
        if self.disagreement is not None and self.jensen_shannon is not None:
            parts += [
                f"{100 * float(self.disagreement.mean()):.2f} % of predictions differ",
                f"Jensen-Shannon divergence {float(self.jensen_shannon.mean()):.4g} nats",
            ]
        return ", ".join(parts)

    def __str__(self) -> str:
        return self.summary()


def functional_distance(
    module: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    data: Batches,
    *,
    classes: bool | None = None,
) -> FunctionalDistance:
    """How far networks are from one another on data, whatever their weights.

    Args:
        module: that computes the networks' function, to one tensor; it is copied and evaluated in evaluation mode.
        a: one network.
        b: another, or many with one leading axis, which run together (``torch.func.vmap``).
        data: batches of inputs and targets; of the targets it only matters whether they are classes.
        classes: whether outputs are logits of classes, along the last axis; by default, where targets are one integer
            per vector of outputs along the last axis, or else along the second.

    Shapes:
        b: as a, or ``(networks, *shape)`` throughout; results are scalars, or ``(networks,)``. float64.

    Raises:
        SpecError: networks of different names or shapes, or with values that are not finite.
        DataError: data that the module refuses, or a module that returns something else than one tensor.

    Example:
        >>> module = nn.Linear(1, 2, bias=False)
        >>> a, b = {"weight": torch.tensor([[1.0], [0.0]])}, {"weight": torch.tensor([[0.0], [1.0]])}
        >>> found = functional_distance(module, a, b, [(torch.ones(4, 1), torch.zeros(4, dtype=torch.long))])
        >>> found.mean_squared.item(), found.disagreement.item()
        (1.0, 1.0)
    """
    a, b = dict(a), dict(b)  # a lazy one is read once
    many = _is_stacked(a, b)
    first = {name: tensor[0] for name, tensor in b.items()} if many else b
    check_networks({"A": a, "B": first})
    check_networks({"B": b})
    check_suits(module, (a, first), data)
    axis = class_axis(module, a, data) if classes is None else -1 if classes else None
    run = on_device(module, a)
    total = _Total()
    with torch.no_grad():
        for inputs, _ in batches(data, next(iter(a.values())).device):
            one, other = outputs_of(run, a, inputs), _call_each(run, b, inputs, many)
            if not isinstance(one, Tensor):
                raise DataError(f"module: expected one tensor as its output, found {type(one).__name__}")
            at = -1 if axis is None else axis
            total.add(one.double().movedim(at, -1), other.double().movedim(at, -1), logits=axis is not None)
    return total.distance()


class _Total:
    """Sums over the data so far."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts = {"samples": 0, "entries": 0, "predictions": 0}

    def add(self, one: Tensor, other: Tensor, *, logits: bool) -> None:
        """The outputs of a batch; those of network B may have an axis in front."""
        places = list(range(-one.ndim, 0))
        terms = {
            "square": (other - one).square().sum(places),
            "norm": one.square().sum(),
        }
        if logits:
            terms |= _divergences(one, other)
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term
        self.counts["samples"] += len(one)
        self.counts["entries"] += one.numel()
        self.counts["predictions"] += one[..., 0].numel() if logits else 0

    def distance(self) -> FunctionalDistance:
        """The means of what was added."""
        sums, counts = self.sums, self.counts
        relative = (sums["square"] / sums["norm"]).sqrt()
        relative = torch.where(sums["square"] == 0, 0.0, relative)  # of two networks that give only zeros
        means = {name: sums[name] / counts["predictions"] for name in _DIVERGENCES if name in sums}
        return FunctionalDistance(
            mean_squared=sums["square"] / counts["entries"],
            relative=relative,
            disagreement=means.get("disagreement"),
            symmetric_kl=means.get("symmetric_kl"),
            jensen_shannon=means.get("jensen_shannon"),
            samples=counts["samples"],
        )


def _divergences(one: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Sums over predictions, from logits along the last axis."""
    places = list(range(1 - one.ndim, 0))
    log_p, log_q = one.log_softmax(-1).expand_as(other), other.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    differ = one.argmax(-1) != other.argmax(-1)
    divergences = {
        "symmetric_kl": (_kl(log_p, log_q) + _kl(log_q, log_p)) / 2,
        "jensen_shannon": (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2,
    }
    terms = {"disagreement": differ.double()} | divergences
    return {name: term.sum(places) if places else term for name, term in terms.items()}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _call_each(module: nn.Module, weights: Mapping[str, Tensor], inputs: Any, many: bool) -> Any:
    if not many:
        return outputs_of(module, weights, inputs)
    return torch.func.vmap(lambda each: outputs_of(module, each, inputs))(dict(weights))


def _is_stacked(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether all tensors of B have one axis more than those of A, in front."""
    if not b or any(
        not tensor.ndim or (name in a and tensor.ndim != a[name].ndim + 1) for name, tensor in b.items()
    ):
        return False
    lengths = {len(tensor) for tensor in b.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise SpecError(
            f"network B: expected one number of networks along the first axis, found {sorted(lengths)}"
        )
    return True


def _plain(value: Tensor) -> Any:
    found = value.tolist()
    entries = found if isinstance(found, list) else [found]
    plain = [entry if math.isfinite(entry) else None for entry in entries]
    return plain if isinstance(found, list) else plain[0]
