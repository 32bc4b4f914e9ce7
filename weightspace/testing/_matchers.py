"""Networks whose best alignment is known: copies of one network, each with noise and in an order of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.nets import ResNet
from weightspace.spec import Element, Weights, WeightSpec

_SAMPLES, _BATCH, _CLASSES = 96, 32, 4


class _Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm, on a stream between two linear layers."""

    def __init__(self, width: int, heads: int, features: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Linear(5, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * features)
        self.out = nn.Linear(heads * features, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Float[Tensor, "batch length 5"]) -> Float[Tensor, "batch classes"]:
        x = self.stem(x)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        logits: Tensor = self.head(x.mean(1))
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, _CLASSES))


def _cnn() -> nn.Module:
    convolutions = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, _CLASSES))


_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (6,)),
    "cnn": (_cnn, (2, 8, 8)),
    "resnet": (lambda: ResNet((2, 6, 6), _CLASSES, blocks=(1, 1), channels=6), (2, 6, 6)),
    "transformer": (lambda: _Block(width=10, heads=3, features=4, hidden=14), (7, 5)),
}

PLANTED: tuple[str, ...] = tuple(_NETWORKS)
"""What :func:`planted` builds: a perceptron, convolutions flattened, a ResNet with batch norm, a transformer block."""


@dataclass(frozen=True, eq=False)
class Planted:
    """Copies of one network with noise, each moved by an element that a matcher should find.

    Args:
        spec: the weight space.
        module: that computes the networks' function, in evaluation mode.
        networks: the copies; the first is not moved.
        elements: by which they were moved.
        data: batches of inputs, and of the classes that the first network predicts.
    """

    spec: WeightSpec
    module: nn.Module
    networks: list[Weights]
    elements: list[Element]
    data: list[tuple[Tensor, Tensor]]


def planted(name: str, networks: int = 3, *, noise: float = 0.03, seed: int = 0) -> Planted:
    """A tiny network and copies of it, with noise on every parameter and the units of every group reordered.

    Its parameters and statistics are random throughout (a fresh batch norm would be the same for all its units).

    Args:
        name: one of ``PLANTED``.
        networks: how many, the first included.
        noise: standard deviation, in those of each tensor.
        seed: of everything.

    Example:
        >>> from weightspace.align import align_networks
        >>> case = planted("mlp", 2)
        >>> _, report = align_networks(case.spec, case.networks)
        >>> found = {name: value[1] for name, value in report.element.items()}
        >>> all(torch.equal(found[name], value) for name, value in case.spec.invert(case.elements[1]).items())
        True
    """
    module, spec, inputs = _traced(name)
    generator = torch.Generator().manual_seed(seed)
    original = _randomised(spec, module, generator)
    identity = spec.identity()
    elements, copies = [{group: identity[group] for group in spec.groups}], [original]
    for _ in range(networks - 1):
        disturbed = {
            key: tensor + noise * tensor.std() * _normal(tensor, generator)
            if key in spec.tensors and spec.tensors[key].kind == "parameter"
            else tensor.clone()
            for key, tensor in original.items()
        }
        elements.append(spec.random_element(symmetries=["permutation"], generator=generator))
        copies.append(spec.act(elements[-1], disturbed))
    with torch.no_grad():
        targets = torch.func.functional_call(module, original, (inputs,)).argmax(-1)
    batches = list(zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True))
    return Planted(spec, module, copies, elements, batches)


@lru_cache(maxsize=len(PLANTED))
def _traced(name: str) -> tuple[nn.Module, WeightSpec, Tensor]:
    build, shape = _NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, inputs = build().eval(), torch.randn(_SAMPLES, *shape)
    return module, WeightSpec.trace(module, inputs[:3], verify=False), inputs


def _randomised(spec: WeightSpec, module: nn.Module, generator: torch.Generator) -> Weights:
    """The state of a network as if it had been trained: no two of its units are alike."""
    found: Weights = {}
    for name, value in module.state_dict().items():
        statistic = name in spec.tensors and spec.tensors[name].kind == "statistic"
        if not value.is_floating_point():
            found[name] = value.clone()
        elif statistic and name.endswith("var"):
            found[name] = value * _normal(value, generator).mul(0.3).exp()
        else:
            # the default initialisation is so small that biases alone would decide what is predicted
            found[name] = 2 * value if value.ndim > 1 else value + 0.2 * _normal(value, generator)
    return found


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)
