"""Small faithful copies of the layouts that the field has, each with the networks that it was made from."""

from __future__ import annotations

import csv
import gzip
import json
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

COORDINATES = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
IMAGES = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(2))
COLOURS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@dataclass
class Source:
    """A folder, and what the networks in it compute, by a key that its test knows."""

    folder: Path
    outputs: dict[Any, torch.Tensor]


class Siren(nn.Module):
    """As DWSNets builds them: ``seq.0``, ``seq.1``, ``seq.2``."""

    def __init__(self, seed: int, widths=(2, 8, 6, 1), offset: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.seq = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])
        self.offset = offset

    def forward(self, x):
        for layer in self.seq[:-1]:
            x = torch.sin(30.0 * layer(x))
        return self.seq[-1](x) + self.offset


def save(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


@torch.no_grad()
def run(network, inputs):
    return network.eval()(inputs)


@pytest.fixture
def dwsnets(tmp_path) -> Source:
    """Eight training and four test images; keys are (is test, item)."""
    outputs = {}
    for item in range(12):
        part, number, label = ("training", item, item % 3) if item < 8 else ("testing", item - 8, item % 2)
        net = Siren(item)
        name = f"mnist_png_{part}_{label}_{number}"
        save(tmp_path / "mnist-inrs" / name / "checkpoints" / f"best_{item}.pth", net.state_dict())
        outputs[item >= 8, number] = run(net, COORDINATES)
    return Source(tmp_path / "mnist-inrs", outputs)


@pytest.fixture
def dwsnets_splits(tmp_path, dwsnets) -> Path:
    """As DWSNets writes them, with the paths of another machine."""
    files = sorted(dwsnets.folder.glob("*/checkpoints/*.pth"))
    splits: dict[str, dict[str, list]] = {
        name: {"path": [], "label": []} for name in ("train", "val", "test")
    }
    for at, file in enumerate(files):
        split = "test" if "testing" in file.parts[-3] else "val" if at % 4 == 3 else "train"
        elsewhere = Path("/home/ann/data/mnist-inrs", *file.parts[-3:])
        splits[split]["path"].append(str(elsewhere))
        splits[split]["label"].append(file.parts[-3].split("_")[-2])
    path = tmp_path / "mnist_splits.json"
    path.write_text(json.dumps(splits))
    return path


@pytest.fixture
def augmentation(tmp_path) -> Source:
    """Three items, two views; the label, not that of the name, is in the file. Keys are (item, view)."""
    outputs = {}
    for view in range(2):
        for item in range(3):
            net = Siren(10 * view + item)
            folder = tmp_path / "inrs" / f"mnist_{view + 1}" / f"mnist_png_training_0_{item}"
            save(folder / "checkpoints" / "net.pth", {**net.state_dict(), "label": item + 4})
            outputs[item, view] = run(net, COORDINATES)
    return Source(tmp_path / "inrs", outputs)


@pytest.fixture
def nfn(tmp_path) -> Source:
    """Three classes, tensors (1, out, in), and augmented copies. Keys are (item, view)."""
    outputs = {}
    for item, at in enumerate([3, 44_999, 45_000, 49_999, 50_000, 59_999]):
        for view, ending in enumerate(["", "_aug1", "_aug10"]):
            net = Siren(item + 50 * view, offset=0.0)
            state = {name: tensor[None].clone() for name, tensor in net.state_dict().items()}
            save(tmp_path / "sirens" / f"mnist_{item % 3}s{ending}" / f"net{at}.pth", state)
            outputs[at, view] = run(net, COORDINATES)
    return Source(tmp_path / "sirens", outputs)


def keras_cnn(row: np.ndarray, activation: str, image: np.ndarray) -> np.ndarray:
    """A slow Small CNN Zoo network, straight from TensorFlow's layout: three valid 3x3 convolutions with stride 2."""
    act = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh}[activation]
    x, at = image, 0  # (height, width, channels)
    for channels_in, channels in ((1, 16), (16, 16), (16, 16)):
        bias = row[at : at + channels]  # the file has biases before kernels
        at += channels
        kernel = row[at : at + 9 * channels_in * channels].reshape(3, 3, channels_in, channels)
        at += kernel.size
        size = (x.shape[0] - 3) // 2 + 1
        z = np.zeros((size, size, channels))
        for i in range(size):
            for j in range(size):
                window = x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                z[i, j] = np.einsum("hwc,hwco->o", window, kernel) + bias
        x = act(z)
    return x.mean((0, 1)) @ row[at + 10 : at + 170].reshape(16, 10) + row[at : at + 10]


@pytest.fixture
def small_cnn_zoo(tmp_path) -> Source:
    """Three networks with two checkpoints each. Keys are rows."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.3, (6, 4970)).astype(np.float32)
    np.save(folder / "weights.npy", weights)
    layout, at = [], 0
    for layer, shape in (("conv2d", (3, 3, 1, 16)), ("conv2d_1", (3, 3, 16, 16)), ("conv2d_2", (3, 3, 16, 16)),
                         ("dense", (16, 10))):  # fmt: skip
        for leaf, of in (("bias", shape[-1:]), ("kernel", shape)):
            size = int(np.prod(of))
            layout.append([f"sequential/{layer}/{leaf}:0", at, at + size, size, str(of)])
            at += size
    with (folder / "layout.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["varname", "start_idx", "end_idx", "size", "shape"], *layout])
    names = ["", "modeldir", "step", "config.activation", "config.optimizer", "config.learning_rate", "config.l2reg",
             "config.dnn_architecture", "laststep", "test_accuracy", "test_loss"]  # fmt: skip
    activations, optimizers = ["relu", "tanh", "relu"], ["sgd", "adam", "adam"]
    rows = [
        [3 * r, f"/cns/x/{r // 2}", 10 * (r % 2), activations[r // 2], optimizers[r // 2], 0.1 * (r // 2 + 1),
         1e-4, "cnn", 86, 0.1 + r / 10, 2.5 - r / 10]
        for r in range(6)
    ]  # fmt: skip
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    images = IMAGES.permute(0, 2, 3, 1).double().numpy()
    outputs = {
        r: torch.tensor(
            np.stack([keras_cnn(weights[r].astype(float), activations[r // 2], x) for x in images])
        )
        for r in range(6)
    }
    return Source(folder, outputs)


class ParkCNN(nn.Module):
    """A network of the Wild Park: 'same' convolutions, shortcuts from earlier layers over the channels of both."""

    def __init__(self, seed, channels, kernels, activation, residual):
        super().__init__()
        torch.manual_seed(seed)
        sizes = zip((3, *channels[:-1]), channels, kernels, strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in sizes)
        self.fc = nn.Linear(channels[-1], 10)
        self.activation, self.residual = activation, residual

    def forward(self, x):
        outputs = []
        for layer, source in zip(self.layers, self.residual, strict=True):
            x = layer(x)
            if source >= 0:
                shared = min(x.shape[1], outputs[source].shape[1])
                x = torch.cat([x[:, :shared] + outputs[source][:, :shared], x[:, shared:]], 1)
            x = {"relu": torch.relu, "tanh": torch.tanh, "gelu": nn.functional.gelu}[self.activation](x)
            outputs.append(x)
        return self.fc(x.mean((-2, -1)))


@pytest.fixture
def cnn_wild_park(tmp_path) -> Source:
    """Two architectures, the second of which two networks have, two checkpoints each. Keys are (trial, step)."""
    folder, outputs, listed = tmp_path / "park", {}, []
    kinds = [((4, 6), (3, 5), "tanh", [-1, -1]), ((4, 6, 5), (3, 3, 3), "relu", [-1, -1, 0])]
    for trial, kind in enumerate([kinds[1], kinds[0], kinds[1]]):
        channels, kernels, activation, residual = kind
        for step in (3, 12):
            net = ParkCNN(10 * trial + step, channels, kernels, activation, residual)
            path = f"trial_{trial}_lr=0.01/checkpoint_{step:06d}/checkpoint.pt"
            config = {"n_layers": len(channels), "activation": activation, "residual": residual, "lr": 0.01 * (trial + 1),
                      "channels": list(channels), "optimizer": "adam"}  # fmt: skip
            save(folder / path, {"model": net.state_dict(), "config": config})
            listed.append({"path": f"/scratch/ray/park/{path}", "score": trial + step / 100, "step": step})
            outputs[trial, step] = run(net, COLOURS)
    (folder / "scores.json").write_text(json.dumps(listed))
    (folder / "experiment_state-2023.json").write_text("{}")
    return Source(folder, outputs)


@pytest.fixture
def modelzoos(tmp_path) -> Source:
    """Two of their small CNNs, checkpoints of epochs 0, 1 and 2. Keys are (network, epoch)."""
    folder, outputs = tmp_path / "mnist_zoo", {}
    for network in range(2):
        below = folder / f"NN_tune_trainable_{network:05d}_seed={network}"
        below.mkdir(parents=True)
        parameters = {"seed": network, "model::nlin": "tanh", "optim::lr": 3e-4 * (network + 1), "model::type": "CNN",
                      "dataset::dump": f"/netscratch/{network}", "resources": {"cpu": 1}}  # fmt: skip
        (below / "params.json").write_text(json.dumps(parameters))
        lines = [{"training_iteration": e, "test_acc": 0.2 * e, "train_loss": 2.0 - e, "time_this_iter_s": 3.3,
                  "pid": 77, "done": False, "config": parameters} for e in (1, 2)]  # fmt: skip
        (below / "result.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for epoch in range(3):
            net = model_zoo_cnn(7 * network + epoch)
            save(below / f"checkpoint_{epoch:06d}" / "checkpoints", net.state_dict())
            outputs[network, epoch] = run(net, IMAGES[:, :, :28, :28])
    return Source(folder, outputs)


class ModelZooCNN(nn.Module):
    """Their small CNN on 28x28 images: convolutions, pooling in between, two linear layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.module_list = nn.ModuleList(
            [nn.Conv2d(1, 8, 5), nn.MaxPool2d(2, 2), nn.Tanh(), nn.Conv2d(8, 6, 5), nn.MaxPool2d(2, 2), nn.Tanh(),
             nn.Conv2d(6, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 10)]
        )  # fmt: skip

    def forward(self, x):
        for layer in self.module_list:
            x = layer(x)
        return x


def model_zoo_cnn(seed: int) -> ModelZooCNN:
    return ModelZooCNN(seed)


@pytest.fixture
def folder(tmp_path) -> Source:
    """State dicts of MLPs in three kinds of files, with a CSV. Keys are file names."""
    from safetensors.torch import save_file

    source, outputs = tmp_path / "mine", {}
    source.mkdir()
    rows = [["path", "label", "colour", "accuracy", "lr", "split"]]
    for number, ending in enumerate(["pt", "pth", "safetensors", "pt"]):
        torch.manual_seed(number)
        net = nn.Sequential(OrderedDict(fc1=nn.Linear(2, 5), act=nn.Tanh(), fc2=nn.Linear(5, 3)))
        name = f"net{number}.{ending}"
        if ending == "safetensors":
            save_file(net.state_dict(), source / name)
        else:
            save(source / name, {"state_dict": net.state_dict(), "epoch": 3} if number else net.state_dict())
        rows.append(
            [
                name,
                number % 2,
                ["red", "blue"][number % 2],
                0.5 + number / 8,
                0.1 * number,
                ["Train", "valid", "testing", "test"][number],
            ]
        )
        outputs[name] = run(net, COORDINATES)
    with (source / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return Source(source, outputs)
