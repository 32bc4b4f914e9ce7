"""``weightspace barrier``: what it measures between networks of files and of zoos, on which data."""

import numpy as np
import pytest
import torch

from weightspace.datagen import generate
from weightspace.nets import MLP, architecture_of
from weightspace.spec import WeightSpec
from weightspace.zoo import Zoo, save_network


@pytest.fixture
def pair(tmp_path):
    """A network, the same with its units in another order, and data that it classifies without error."""
    torch.manual_seed(0)
    net = MLP((4, 16, 3), activation="relu")
    spec = WeightSpec.mlp([4, 16, 3])
    weights = {name: tensor.detach() * 3 for name, tensor in net.state_dict().items()}
    moved = spec.act(spec.random_element(symmetries=["permutation"]), weights)
    for name, state in (("a", weights), ("b", moved)):
        save_network(tmp_path / f"{name}.safetensors", state, architecture_of(net))
    x = torch.randn(200, 4)
    y = torch.func.functional_call(net, weights, (x,)).argmax(-1)
    np.savez(tmp_path / "xy.npz", x=x[:150], y=y[:150], x_test=x[150:], y_test=y[150:])
    return tmp_path, [
        "barrier",
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "--data",
        tmp_path / "xy.npz",
    ]


def test_alignment_removes_the_barrier_of_a_permuted_copy(document, call, pair):
    folder, arguments = pair
    naive = document(*arguments, "--points", 11)
    assert naive["loss_barrier"] > 0.05
    assert naive["accuracy_barrier"] > 0.01
    assert [point["lambda"] for point in naive["curve"]] == pytest.approx(np.linspace(0, 1, 11))
    assert naive["curve"][0]["accuracy"] == naive["curve"][-1]["accuracy"] == 1.0
    assert naive["measured_on"] == "test"
    assert naive["data"].endswith("xy.npz: 150 items for training and 50 for tests")
    found = document(*arguments, "--points", 5, "--align", "weight-matching", "-o", folder / "curve.png")
    assert found["loss_barrier"] == pytest.approx(0, abs=1e-6)
    assert found["accuracy_barrier"] == 0
    assert found["output"] == str(folder / "curve.png")
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = call(*arguments, "--points", 5, "--align", "weight-matching")
    assert code == 0
    assert "aligned by weight-matching: the function changed by" in out
    assert "test: loss barrier" in out


def test_classifiers_of_a_zoo_are_measured_on_what_they_learned_from(document, tmp_path):
    small = {
        "training.epochs": 2,
        "checkpoints": [],
        "data.count": 300,
        "source.size": 8,
        "network.widths": [8],
    }
    path = tmp_path / "zoo.h5"
    recipe = {name: value for name, value in small.items() if name not in ("source.size", "network.widths")}
    generate("digits-mlp", path, count=2, overrides=recipe, device="cpu", progress=False)
    (name,) = Zoo.open(path)
    found = document("barrier", f"{path}::{name}[0]", f"{path}::{name}[1]", "--points", 3)
    stored = Zoo.open(path)[name].metrics["test_accuracy"][:2]
    assert [found["curve"][0]["accuracy"], found["curve"][-1]["accuracy"]] == pytest.approx(stored, abs=1e-6)
    assert "digits as recipe digits-mlp prepares it" in found["data"]


def test_data_are_split_reshaped_and_normalised(document, tmp_path):
    net = MLP((64, 8, 10), activation="relu")
    for name in ("a", "b"):
        save_network(tmp_path / f"{name}.safetensors", net.state_dict(), architecture_of(net))
    arguments = ["barrier", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--points", 3]
    found = document(*arguments, "--data", "digits:size=8", "--mean", "0.3", "--std", "0.4")
    assert found["data"] == (
        "digits:size=8: 1,438 items for training and 359 for tests, reshaped from [1, 8, 8] to [64]"
    )
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = np.random.default_rng([0, 1797]).permutation(1797)[:359]
    x = torch.from_numpy(np.round(digits.images[rows] / 16 * 255) / 255).float().reshape(-1, 64)
    outputs = net((x - 0.3) / 0.4)
    loss = torch.nn.functional.cross_entropy(outputs, torch.from_numpy(digits.target[rows]).long())
    assert found["curve"][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_mistakes_are_one_line_before_work(refuse, pair):
    folder, arguments = pair
    assert refuse(*arguments[:3]) == "barrier: it needs --data, such as digits or FILE.npz"
    assert "--data: expected FILE.npz or one of" in refuse(*arguments[:4], "mnist")
    assert "digits: size: " in refuse(*arguments[:4], "digits:size=3")
    assert "digits: speed: no such option; expected one of size" in refuse(*arguments[:4], "digits:speed=3")
    assert "idx: folder: " in refuse(*arguments[:4], "idx")
    message = refuse(*arguments[:4], "digits")
    assert "items are of shape [1, 28, 28], 784 values, and the module takes inputs of shape [4]" in message
    assert "no.npz: file not found" in refuse(*arguments[:4], folder / "no.npz")
    (folder / "bad.npz").write_bytes((folder / "xy.npz").read_bytes()[:100])
    assert "bad.npz: cannot be read, it may be truncated" in refuse(*arguments[:4], folder / "bad.npz")
    np.savez(folder / "x.npz", x=np.zeros((3, 4)))
    assert "expected arrays x and y, and 'y' is not in x" in refuse(*arguments[:4], folder / "x.npz")
    np.savez(folder / "x.npz", x=np.zeros((3, 4)), y=np.zeros(2))
    assert "as many items in x as in y, found [3, 4] and [2]" in refuse(*arguments[:4], folder / "x.npz")
    np.savez(folder / "x.npz", x=np.full((3, 4), np.nan), y=np.zeros(3))
    assert "x: expected finite numbers" in refuse(*arguments[:4], folder / "x.npz")
    assert "--std: expected numbers above 0" in refuse(*arguments, "--std", "0")
    assert "--mean: expected 1 number or 4, one per channel, found 2" in refuse(*arguments, "--mean", "1,2")
    assert "points: expected at least 3, found 2" in refuse(*arguments, "--points", "2")
    assert "ends in .png, .pdf, .svg, found" in refuse(*arguments, "-o", folder / "curve.txt")
    assert "--set restarts: expected --align beside it" in refuse(*arguments, "--set", "restarts=2")
    assert "method: expected one of" in refuse(*arguments, "--align", "magic")
    (folder / "curve.png").write_text("")
    assert "curve.png exists already" in refuse(*arguments, "-o", folder / "curve.png")
