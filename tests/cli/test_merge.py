"""``weightspace merge``: every method from files to a file, streamed; what is recorded and refused."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import weightspace.cli._merge as command
from weightspace.merge import MERGERS, merge_networks
from weightspace.nets import MLP, architecture_of
from weightspace.testing import tiny_zoo
from weightspace.zoo import load_network, save_network

USER_MODULE = """
from torch import nn


def classifier(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
"""
TIED_MODULE = """
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(5, 2)
        self.outer = nn.Linear(2, 5, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, tokens):
        return self.outer(self.inner(tokens))
"""
BASED = ("task-arithmetic", "ties", "dare", "dare-ties", "model-stock")


def classifier():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def files(tmp_path):
    """A base and two networks that were made from it, in three formats, and data."""
    (tmp_path / "users.py").write_text(USER_MODULE)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = classifier().state_dict()

    def tuned():
        moved = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        return {
            **moved,
            "1.running_var": base["1.running_var"] * 1.5,
            "1.num_batches_tracked": torch.tensor(3),
        }

    a, b = tuned(), tuned()
    save_network(tmp_path / "base.safetensors", base)
    save_network(tmp_path / "a.safetensors", a)
    torch.save({"state_dict": b, "epoch": 2}, tmp_path / "b.pt")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "xy.npz", x=rng.standard_normal((60, 4), np.float32), y=rng.integers(0, 3, 60))
    return tmp_path, base, a, b


def merged_with(document, folder, method, *more):
    paths = [folder / "a.safetensors", folder / "b.pt", "-o", folder / f"{method}.safetensors"]
    return document("merge", *paths, "--method", method, *more), load_file(folder / f"{method}.safetensors")


def same(found, expected):
    assert set(found) == set(expected)
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["average", "slerp", *BASED])
def test_checkpoints_of_any_architecture_are_merged_as_in_memory(document, files, method):
    folder, base, a, b = files
    based = method in BASED
    more = ["--base", folder / "base.safetensors"] if based else []
    document_, found = merged_with(document, folder, method, *more)
    assert same(found, merge_networks(method, [a, b], **({"base": base} if based else {})))
    assert (document_["method"], document_["output"]) == (method, str(folder / f"{method}.safetensors"))


def test_every_method_is_reached(document, files):
    """Those that need to know from data, too; the rest is tested above."""
    folder, _, a, b = files
    known = ["--module", f"{folder / 'users.py'}:classifier", "--data", folder / "xy.npz", "--batch-size", 16]
    for method in ("fisher", "regmean", "greedy-soup", "gradient-matching"):
        base = ["--base", folder / "base.safetensors"] if method == "gradient-matching" else []
        document_, found = merged_with(document, folder, method, *known, *base)
        assert document_["data"][0].endswith("48 items for training and 12 for tests")
        between = [
            torch.minimum(a[n], b[n]) - 1e-6 <= found[n] <= torch.maximum(a[n], b[n]) + 1e-6
            if not found[n].ndim
            else (found[n] - (a[n] + b[n]) / 2).abs().max() <= (a[n] - b[n]).abs().max()
            for n in found
            if method != "gradient-matching"
        ]
        assert all(between), method
    assert {
        "average",
        "weighted",
        "slerp",
        "fisher",
        "regmean",
        "greedy-soup",
        "gradient-matching",
        *BASED,
    } == {*MERGERS}
    each = ["--data", folder / "xy.npz"] * 2
    merged_with(document, folder, "fisher", *known[:2], *each, "--overwrite")


def test_weights_are_normalised_and_options_are_set(document, files):
    folder, base, a, b = files
    arguments = ["merge", folder / "a.safetensors", folder / "b.pt", "-o"]
    found = document(*arguments, folder / "w.pt", "--weights", "1,3")
    assert (found["method"], found["options"]) == ("weighted", {"weights": [1.0, 3.0]})
    stored = torch.load(folder / "w.pt", weights_only=True)
    torch.testing.assert_close(stored["0.weight"], 0.25 * a["0.weight"] + 0.75 * b["0.weight"])
    based = ["--base", folder / "base.safetensors", "--method"]
    found = document(*arguments, folder / "t.pt", *based, "task-arithmetic", "--weights", "0,2")
    stored = torch.load(folder / "t.pt", weights_only=True)
    torch.testing.assert_close(stored["0.bias"], base["0.bias"] + 2 * (b["0.bias"] - base["0.bias"]))
    found = document(*arguments, folder / "d.pt", *based, "dare", "--set", "rate=0.9", "--seed", 5)
    assert found["options"] == {"rate": 0.9, "weights": None, "seed": 5}
    expected = merge_networks("dare", [a, b], base=base, rate=0.9, seed=5)
    assert same(torch.load(folder / "d.pt", weights_only=True), expected)


def test_metadata_say_what_was_merged(document, files):
    folder, *_ = files
    merged_with(document, folder, "ties", "--base", folder / "base.safetensors", "--set", "density=0.5")
    with safe_open(folder / "ties.safetensors", framework="pt") as file:
        made = json.loads(file.metadata()["weightspace"])
    assert (made["command"], made["method"]) == ("merge", "ties")
    assert made["options"] == {"density": 0.5, "weights": None, "scaling": 1.0}, "defaults too"
    assert [network["name"] for network in made["networks"]] == ["a.safetensors", "b.pt", "base.safetensors"]
    assert made["base"] == 2
    assert all(digest.startswith("sha256:") for n in made["networks"] for digest in n["digests"].values())


def test_networks_that_were_trained_apart_are_aligned_first(document, tmp_path):
    zoo = tiny_zoo(networks=4).save(tmp_path / "zoo.h5")
    networks = [f"{zoo}::inr[0]", f"{zoo}::inr[1]"]
    found = document("merge", *networks, "--align", "weight-matching", "-o", tmp_path / "m.safetensors")
    assert found["max_relative_change"] < 1e-5
    document("align", *networks, "-o", tmp_path / "b.safetensors")
    document("merge", networks[0], tmp_path / "b.safetensors", "-o", tmp_path / "n.safetensors")
    assert same(load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "n.safetensors"))
    assert load_network(tmp_path / "m.safetensors").architecture["kind"] == "mlp"


def test_tensors_that_the_module_ties_stay_tied(document, refuse, files):
    folder, *_ = files
    (folder / "tied.py").write_text(TIED_MODULE)
    tokens = np.random.default_rng(0).integers(0, 5, (12, 3))
    np.savez(folder / "tokens.npz", x=tokens, y=tokens)
    for number, name in enumerate(("a", "b", "base")):
        generator = torch.Generator().manual_seed(number)
        shared = torch.randn(5, 2, generator=generator)
        save_file({"inner.weight": shared, "outer.weight": shared.clone()}, folder / f"t{name}.safetensors")
    arguments = ["merge", folder / "ta.safetensors", folder / "tb.safetensors", "--overwrite"]
    arguments += ["-o", folder / "t.safetensors", "--module", f"{folder / 'tied.py'}:Tied"]
    known = ["--data", folder / "tokens.npz", "--method"]
    for options in (
        [*known, "fisher"],
        [*known, "greedy-soup"],
        ["--base", folder / "tbase.safetensors", "--method", "dare"],
    ):
        document(*arguments, *options)
        merged = load_file(folder / "t.safetensors")
        assert torch.equal(merged["inner.weight"], merged["outer.weight"]), options[-1]
    save_file({"inner.weight": shared, "outer.weight": -shared}, folder / "tb.safetensors")
    message = refuse(*arguments)
    assert "tb.safetensors: 'outer.weight' is tied to 'inner.weight', expected equal values" in message


def test_a_soup_of_half_precision_and_data_that_do_not_suit(document, refuse, files):
    folder, _, a, b = files
    for name, state in (("a", a), ("b", b)):
        half = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
        save_network(folder / f"h{name}.pt", half)
    arguments = [
        "merge",
        folder / "ha.pt",
        folder / "hb.pt",
        "-o",
        folder / "soup.pt",
        "--method",
        "greedy-soup",
    ]
    arguments += ["--module", f"{folder / 'users.py'}:classifier", "--data"]
    found = document(*arguments, folder / "xy.npz")
    assert found["data"] == ["xy.npz: 48 items for training and 12 for tests"], "no local path"
    assert torch.load(folder / "soup.pt")["0.weight"].dtype == torch.float16
    np.savez(folder / "thin.npz", x=np.zeros((10, 3), np.float32), y=np.zeros(10, np.int64))
    message = refuse(*arguments, folder / "thin.npz", "--overwrite")
    assert message.startswith("data: the module cannot be called with float32[2, 3]")


def test_batch_norm_is_estimated_again(document, call, files):
    folder, *_ = files
    known = ["--module", f"{folder / 'users.py'}:classifier", "--data", folder / "xy.npz"]
    _, plain = merged_with(document, folder, "average")
    code, _, err = call(
        "merge", folder / "a.safetensors", folder / "b.pt", "-o", folder / "x.safetensors", "-q"
    )
    assert (code, "BatchNorm statistics are averages: --repair" in err) == (0, True)
    _, reset = merged_with(document, folder, "average", *known, "--repair", "batch-norm", "--overwrite")
    assert torch.equal(plain["0.weight"], reset["0.weight"])
    content = np.load(folder / "xy.npz")
    rows = np.setdiff1d(np.arange(60), np.random.default_rng([0, 60]).permutation(60)[:12])
    hidden = torch.from_numpy(content["x"][rows]) @ plain["0.weight"].T + plain["0.bias"]
    torch.testing.assert_close(reset["1.running_mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)


def test_mistakes_are_one_line_before_work(refuse, files, monkeypatch):
    folder, _, a, _ = files
    monkeypatch.chdir(folder)
    arguments = ["merge", "a.safetensors", "b.pt", "-o", "out.safetensors"]
    based = [*arguments, "--method", "ties", "--base"]
    assert "no.pt: file not found" in refuse("merge", "a.safetensors", "no.pt", "-o", "out.pt")
    assert "expected at least two, found 1" in refuse("merge", "a.safetensors", "-o", "out.pt")
    assert "method: expected one of average" in refuse(*arguments, "--method", "magic")
    assert refuse(*arguments, "--set", "t=1").startswith("--set t: average has no such option")
    assert refuse(*arguments, "--method", "slerp", "--weights", "1,2").startswith("--weights: slerp has no")
    assert "--weights: expected numbers" in refuse(*arguments, "--weights", "half")
    assert "weights: expected one per network, 2, found 3" in refuse(*arguments, "--weights", "1,2,3")
    assert "finite" in refuse(*arguments, "--weights", "nan,1")
    assert "weights: expected a sum other than 0" in refuse(*arguments, "--weights", "1,-1")
    assert "ties: it needs base, found none" in refuse(*arguments, "--method", "ties")
    assert "--base: average makes no use of one" in refuse(*arguments, "--base", "base.safetensors")
    os.symlink("a.safetensors", "link.safetensors")
    assert "found a.safetensors, one of them" in refuse(*based, "link.safetensors")
    save_network("copy.safetensors", a)
    assert "found the values of a.safetensors" in refuse(*based, "copy.safetensors")
    assert "ties: density: " in refuse(*based, "base.safetensors", "--set", "density=1.5")
    assert "dare: rate: " in refuse(
        *arguments, "--method", "dare", "--base", "base.safetensors", "--set", "rate=1"
    )
    assert "is the input a.safetensors" in refuse(*arguments[:3], "-o", "link.safetensors", "--overwrite")
    assert "is the input b.pt" in refuse(*arguments[:3], "-o", f"../{folder.name}/b.pt", "--overwrite")
    assert "fisher: it runs the networks: pass --module" in refuse(*arguments, "--method", "fisher")
    known = ["--module", "users.py:classifier", "--repair", "repair"]
    assert "--repair: it needs --data" in refuse(*arguments, *known)
    three = ["--data", "xy.npz"] * 3
    assert "--data: expected one for all, or one for each of 2 networks, found 3" in refuse(
        *arguments, *known, *three
    )
    message = refuse(*arguments, "--align", "weight-matching")
    assert "no architecture is stored beside the weights, and --align needs it" in message
    assert not (folder / "out.safetensors").exists()


def test_networks_that_do_not_fit_are_refused(refuse, files):
    folder, _, a, _ = files
    path = folder / "other.safetensors"
    arguments = ["merge", folder / "a.safetensors", path, "-o", folder / "out.safetensors"]

    def refused(**changes):
        save_file({n: t.contiguous() for n, t in {**a, **changes}.items() if t is not None}, path)
        return refuse(*arguments)

    message = refused(**{"0.weight": a["0.weight"].T})
    assert message == f"'0.weight' is [8, 4] in {arguments[1]} and [4, 8] in {path}: transposed"
    assert f"{path}: tensor '3.bias' of {arguments[1]} is missing" in refused(**{"3.bias": None})
    assert f"{path}: tensor 'more' is not in {arguments[1]}" in refused(more=torch.ones(1))
    spoilt = a["0.weight"].clone()
    spoilt[1, 2] = torch.inf
    message = refused(**{"0.weight": spoilt})
    assert message.startswith(f"{path}: '0.weight'")
    assert "NaN or infinite" in message
    path.write_bytes(path.read_bytes()[:-8])
    assert "other.safetensors: not a readable safetensors file" in refuse(*arguments)
    one, two = (MLP((2, 4, 1), activation=activation) for activation in ("relu", "tanh"))
    save_network(arguments[1], one.state_dict(), architecture_of(one), overwrite=True)
    save_network(path, two.state_dict(), architecture_of(two), overwrite=True)
    assert "its architecture differs from that of" in refuse(*arguments)


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (OSError(errno.ENOSPC, "full"), 2, "out.safetensors could not be written (No space left on device)"),
    ],
)
def test_what_goes_wrong_in_the_middle_leaves_nothing(call, files, monkeypatch, problem, code, message):
    folder, *_ = files
    real = command.write_tensors

    def stopped(tensors):
        yield next(tensors)
        raise problem

    monkeypatch.setattr(
        command,
        "write_tensors",
        lambda path, layout, tensors, *r, **o: real(path, layout, stopped(tensors), *r, **o),
    )
    before = {path.name for path in folder.iterdir()}
    found = call("merge", folder / "a.safetensors", folder / "b.pt", "-o", folder / "out.safetensors")
    assert found[0] == code
    assert message in found[2]
    assert {path.name for path in folder.iterdir()} == before
