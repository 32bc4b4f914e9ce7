"""The networks of the alignment study: trained one by one, from seeds that differ in initialisation and in shuffles."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from weightspace.datagen.sources import Digits, Idx
from weightspace.nets import MLP, Network, ResNet
from weightspace.spec import Weights, WeightSpec

EVALUATION_BATCH = 2000


@dataclass(frozen=True)
class Protocol:
    """How a network is trained: stochastic gradient descent with momentum, bfloat16 autocast.

    Args:
        epochs: over all training images, each in a fresh random order.
        rate: the learning rate after a linear warm-up of one twentieth of the steps; it then falls to 0 along a cosine.
        momentum: of the descent.
        decay: weight decay.
        batch: images a step.
    """

    epochs: int
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    batch: int = 128

    def __str__(self) -> str:
        return (
            f"SGD, momentum {self.momentum:g}, weight decay {self.decay:g}, rate {self.rate:g} with a linear warm-up "
            f"and a cosine to 0, batches of {self.batch}, {self.epochs} epochs, bfloat16 autocast"
        )


@dataclass(frozen=True)
class Endpoint:
    """One trained network.

    Args:
        data: name of the data set.
        kind: ``"mlp"``, ``"resnet-batch"`` or ``"resnet-layer"``.
        width: hidden units of an MLP, multiple of the channels of a ResNet.
        seed: of the initialisation and of the order of the images.
        epochs: how long it is trained.
    """

    data: str
    kind: str
    width: float
    seed: int
    epochs: int

    @property
    def protocol(self) -> Protocol:
        """How it is trained."""
        return Protocol(self.epochs)

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.data}-{self.kind}-{self.width}-{self.epochs}-{self.seed}"


@dataclass(frozen=True)
class Images:
    """Normalised images of one data set, ``(images, 1, side, side)``, and their classes."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_images(data: str, data_root: Path | None, pooled: bool) -> Images:
    """All images of a data set, with mean 0 and variance 1 over the training set; ``pooled`` averages squares of 2x2.

    ``"digits"`` are the 8x8 images that come with scikit-learn, every fifth for testing, and they are never pooled.
    """
    if data == "digits":
        signals = Digits().load(None)
        is_test = np.arange(len(signals.items)) % 5 == 4
        pooled = False
    else:
        signals = Idx(folder=data).load(data_root)
        is_test = signals.official == 2
    x = torch.from_numpy(np.asarray(signals.items, dtype=np.float32))
    x = x.reshape(len(x), 1, *x.shape[1:3])
    x = F.avg_pool2d(x, 2) if pooled else x
    y = torch.from_numpy(np.asarray(signals.labels, dtype=np.int64))
    chosen = torch.from_numpy(is_test)
    deviation, mean = torch.std_mean(x[~chosen])
    x = (x - mean) / deviation
    return Images((x[~chosen], y[~chosen]), (x[chosen], y[chosen]))


def build(endpoint: Endpoint, side: int) -> Network:
    """The network, with the initialisation of PyTorch's layers."""
    if endpoint.kind == "mlp":
        hidden = [int(endpoint.width)] * 3
        return MLP((side * side, *hidden, 10), activation="relu", input_shape=(1, side, side))
    norm = endpoint.kind.removeprefix("resnet-")
    return ResNet((1, side, side), 10, blocks=(1, 1, 1), channels=16, width=endpoint.width, norm=norm)


def batches(part: tuple[Tensor, Tensor], size: int = EVALUATION_BATCH) -> list[tuple[Tensor, Tensor]]:
    """A part of the images in batches."""
    return list(zip(*(tensor.split(size) for tensor in part), strict=True))


@torch.no_grad()
def score(
    module: torch.nn.Module, weights: Weights, data: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Mean loss and accuracy of one network, in evaluation mode."""
    module.eval()
    total, right, count = 0.0, 0, 0
    for x, y in data:
        logits = torch.func.functional_call(module, weights, (x,))
        total += float(F.cross_entropy(logits, y, reduction="sum"))
        right += int((logits.argmax(1) == y).sum())
        count += len(y)
    return {"loss": total / count, "accuracy": right / count}


def train(
    endpoint: Endpoint, images: Images, protocol: Protocol | None = None
) -> tuple[Weights, dict[str, float]]:
    """Train one network; its weights, and loss and accuracy on all training and test images."""
    begin = time.perf_counter()
    protocol = protocol or endpoint.protocol
    torch.manual_seed(endpoint.seed)
    module = build(endpoint, images.train[0].shape[-1]).train()
    module = module.to(memory_format=torch.channels_last)
    x, y = images.train
    steps = protocol.epochs * math.ceil(len(x) / protocol.batch)
    optimizer, schedule = _optimizer(module, protocol, steps)
    for rows in _order(len(x), protocol, endpoint.seed):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = module(x[rows])
        loss = F.cross_entropy(logits.float(), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    found = {
        f"{split}_{name}": value
        for split in ("train", "test")
        for name, value in score(module, weights, batches(getattr(images, split))).items()
    }
    return weights, {**found, "seconds": time.perf_counter() - begin}


def _optimizer(
    module: torch.nn.Module, protocol: Protocol, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(
        module.parameters(), protocol.rate, protocol.momentum, weight_decay=protocol.decay, fused=True
    )
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        left = (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
        return (step + 1) / (warm + 1) if step < warm else left

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _order(images: int, protocol: Protocol, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(protocol.epochs):
        yield from torch.randperm(images, generator=generator).split(protocol.batch)


class Store:
    """Endpoints on disk, and the images that they are trained on."""

    def __init__(self, folder: Path, data_root: Path | None, may_train: bool = True) -> None:
        self.folder, self.data_root, self.may_train = folder / "endpoints", data_root, may_train
        self._images: dict[tuple[str, bool], Images] = {}
        self._specs: dict[tuple[str, str, float], WeightSpec] = {}

    def images(self, endpoint: Endpoint) -> Images:
        """What the endpoint is trained and judged on."""
        key = (endpoint.data, endpoint.kind != "mlp")
        if key not in self._images:
            self._images[key] = load_images(key[0], self.data_root, pooled=key[1])
        return self._images[key]

    def module(self, endpoint: Endpoint) -> Network:
        """A module of the endpoint's architecture, in evaluation mode."""
        built = build(endpoint, self.images(endpoint).train[0].shape[-1])
        return built.eval().requires_grad_(False)

    def spec(self, endpoint: Endpoint) -> WeightSpec:
        """The weight space of the endpoint's architecture."""
        key = (endpoint.data, endpoint.kind, endpoint.width)
        if key not in self._specs:
            module = self.module(endpoint)
            self._specs[key] = WeightSpec.trace(module, module.example_inputs())
        return self._specs[key]

    def weights(self, endpoint: Endpoint) -> Weights:
        """Its weights; trained unless they are there."""
        with safe_open(self._path(endpoint), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def scores(self, endpoint: Endpoint) -> dict[str, float]:
        """Loss and accuracy on all training and test images, and the seconds of training."""
        with safe_open(self._path(endpoint), "pt") as file:
            return dict(json.loads(file.metadata()["scores"]))

    def is_there(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint is trained, or may be."""
        return self.may_train or self._file(endpoint).exists()

    def _file(self, endpoint: Endpoint) -> Path:
        return self.folder / f"{endpoint.name}.safetensors"

    def _path(self, endpoint: Endpoint) -> Path:
        path = self._file(endpoint)
        if not path.exists():
            weights, scores = train(endpoint, self.images(endpoint))
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            save_file(
                weights,
                partial,
                {"scores": json.dumps(scores), "protocol": str(endpoint.protocol)},
            )
            partial.replace(path)
            print(f"{endpoint.name}: {json.dumps(scores)}", flush=True)
        return path
