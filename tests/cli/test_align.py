"""``weightspace align``: networks of zoos, files and modules; what is compared, written and refused."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from weightspace.nets import MLP, architecture_of, build, coordinate_grid
from weightspace.spec import WeightSpec
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo, load_network, save_network

WIDE = '{"kind": "mlp", "arguments": {"widths": [2, 8, 8, 1], "output_offset": 0.5}}'
USER_MODULE = """
import torch
from torch import nn


class Tagger(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.inner = nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, tokens, scale):
        hidden = self.embedding(tokens) * scale.unsqueeze(-1)
        return self.head(hidden + self.inner(hidden))


def classifier(width=16):
    return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "users.py"
    path.write_text(USER_MODULE)
    return path


def outputs(reference, inputs):
    network = load_network(reference)
    net = build(network.architecture).double()
    weights = {name: tensor.double() for name, tensor in network.weights.items()}
    return torch.func.functional_call(net, weights, (inputs,))


def test_align_keeps_the_function(document, call, refuse, zoo, tmp_path):
    a, b, aligned = f"{zoo}::inr[0]", f"{zoo}::inr[1]", tmp_path / "aligned.safetensors"
    found = document("align", a, b, "-o", aligned, "--set", "symmetries=[permutation, sign]")
    assert found["output"] == str(aligned)
    assert (found["method"], found["options"]["symmetries"]) == ("weight-matching", ["permutation", "sign"])
    assert found["max_relative_change"] < 1e-5
    assert found["distance_after"] < found["distance_before"]
    grid = coordinate_grid((9, 9)).double()
    torch.testing.assert_close(outputs(aligned, grid), outputs(b, grid), rtol=1e-6, atol=1e-6)
    one, other = load_network(a).weights, load_network(aligned).weights
    product = sum((one[name].double() * other[name]).sum() for name in one)
    assert found["objective"] == pytest.approx(float(product))
    assert not torch.equal(load_network(b).weights["layers.1.weight"], other["layers.1.weight"])
    before = aligned.read_bytes()
    assert "aligned.safetensors exists already" in refuse("align", a, b, "-o", aligned)
    assert aligned.read_bytes() == before
    code, out, err = call("align", a, b, "-o", aligned, "--overwrite")
    assert (code, err) == (0, "")
    assert "weight-matching: L2 distance" in out
    assert "the function changed by" in out


def test_metadata_say_how_it_was_made(document, zoo, tmp_path):
    path = tmp_path / "aligned.safetensors"
    document("align", f"{zoo}::inr[0]", f"{zoo}::inr[1]", "-o", path, "--seed", 4)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    made = json.loads(metadata["weightspace"])
    assert (made["command"], made["method"], made["seed"]) == ("align", "weight-matching", 4)
    digest = Zoo.open(zoo).digest
    assert made["networks"][1] == {"name": "zoo.h5::inr[1]", "digests": {"zoo.h5": digest}}
    assert str(zoo.parent) not in json.dumps(metadata), "no local path"
    assert json.loads(metadata["architecture"])["kind"] == "mlp"


def test_three_networks_make_a_folder(document, refuse, zoo, tmp_path):
    networks = [f"{zoo}::inr[{row}]" for row in (0, 1, 2)]
    found = document("align", *networks, "-o", tmp_path / "three")
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == [
        f"inr-{row}.safetensors" for row in range(3)
    ]
    first = load_file(tmp_path / "three" / "inr-0.safetensors")
    assert all(torch.equal(first[name], t) for name, t in load_network(networks[0]).weights.items())
    rows = found["networks"]
    assert [row["distance_before"] == 0 for row in rows] == [True, False, False]
    assert found["max_relative_change"] == max(row["max_relative_change"] for row in rows) < 1e-5
    assert found["distance_after"] == pytest.approx(np.mean([row["distance_after"] for row in rows[1:]]))
    assert "three exists already" in refuse("align", *networks, "-o", tmp_path / "three")
    (tmp_path / "three" / "mine.txt").write_text("kept")
    document("align", *networks, "-o", tmp_path / "three", "--overwrite")
    assert (tmp_path / "three" / "mine.txt").read_text() == "kept"
    assert not list(tmp_path.glob(".*")), "no temporary folder is left"
    message = refuse("align", *networks, "-o", tmp_path / "out.safetensors")
    assert "expected the name of a folder for 3 networks" in message


def test_methods_that_move_all_networks_write_all(document, refuse, zoo, tmp_path):
    networks = [f"{zoo}::inr[0]", f"{zoo}::inr[0]"]
    assert "a folder for 2 networks" in refuse(
        "align", *networks, "--method", "merge-many", "-o", tmp_path / "a.pt"
    )
    found = document("align", *networks, "--method", "merge-many", "-o", tmp_path / "both")
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "0-inr-0.safetensors",
        "1-inr-0.safetensors",
    ]
    assert found["max_relative_change"] < 1e-5


@pytest.mark.parametrize("command", ["align", "barrier"])
def test_state_dicts_need_an_architecture(document, refuse, tmp_path, command):
    for name in ("a", "b"):
        torch.save(MLP((2, 8, 8, 1), output_offset=0.5).state_dict(), tmp_path / f"{name}.pt")
    np.savez(tmp_path / "xy.npz", x=np.zeros((10, 2), np.float32), y=np.zeros(10, np.float32))
    output = ["-o", tmp_path / "out.safetensors"] if command == "align" else ["--data", tmp_path / "xy.npz"]
    arguments = [command, tmp_path / "a.pt", tmp_path / "b.pt", *output]
    message = refuse(*arguments)
    assert "pass --module and --input" in message
    assert "or --architecture" in message
    assert "expected JSON or a file that holds it" in refuse(*arguments, "--architecture", "mlp")
    assert "rnn, found 'tree'" in refuse(*arguments, "--architecture", '{"kind": "tree"}')
    assert "arguments: {...}}, found" in refuse(*arguments, "--architecture", '{"kind": "cnn"}')
    message = refuse(*arguments, "--architecture", WIDE.replace("8, 8", "8, 7"))
    if command == "align":
        assert "'layers.1.weight' is [7, 8] in the architecture and [8, 8] in" in message
    (tmp_path / "architecture.json").write_text(WIDE)
    document(*arguments, "--architecture", tmp_path / "architecture.json")
    if command == "align":
        assert load_network(tmp_path / "out.safetensors").architecture == json.loads(WIDE)


def two_of(module, tmp_path, *, drop=()):
    """The same network twice, the second with its units in another order, without some names."""
    spec = WeightSpec.trace(module, module.example, verify=False)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    moved = spec.act(spec.random_element(symmetries=["permutation"], generator=generator), weights)
    for name, state in (("a", weights), ("b", moved)):
        kept = {key: tensor for key, tensor in state.items() if key not in drop}
        save_network(tmp_path / f"{name}.safetensors", kept)
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def test_a_users_module_with_several_inputs_and_tied_weights(document, refuse, file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    import users

    torch.manual_seed(0)
    module = users.Tagger()
    module.example = (torch.randint(11, (2, 5)), torch.rand(2, 5))
    a, b = two_of(
        module, tmp_path, drop=["embedding.weight"]
    )  # as some programs leave out one of a tied pair
    known = ["--module", f"{file}:Tagger", "--input", "int64:2,5:11", "--input", "2,5"]
    found = document("align", a, b, "-o", tmp_path / "c.safetensors", *known)
    assert found["max_relative_change"] < 1e-12
    assert found["distance_after"] < 1e-6 < found["distance_before"]
    one, other = load_file(a), load_file(tmp_path / "c.safetensors")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    message = refuse("align", a, b, "-o", tmp_path / "d.pt", "--module", f"{file}:Tagger")
    assert message.startswith("--input: expected the shape of an input of --module")
    message = refuse("align", a, b, "-o", tmp_path / "d.pt", "--input", "2,5")
    assert message == "--input: expected --module beside it, found none"
    message = refuse("align", a, b, "-o", tmp_path / "d.pt", *known, "--module-args", "width=7")
    assert "is [11, 7] in the architecture and [11, 6] in" in message


def test_a_spec_from_a_file_serves_without_the_module(call, refuse, file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    import users

    module = users.classifier()
    module.example = (torch.randn(4, 64),)
    a, b = two_of(module.eval(), tmp_path)
    spec = tmp_path / "spec.json"
    spec.write_text(WeightSpec.trace(module, module.example, verify=False).to_json())
    code, out, err = call("align", a, b, "-o", tmp_path / "c.pt", "--spec", spec, "--json")
    assert code == 0
    assert json.loads(out)["max_relative_change"] is None
    assert "warning: the outputs were not compared" in err
    assert torch.load(tmp_path / "c.pt")["0.weight"].equal(load_file(a)["0.weight"])
    spec.write_text("{")
    assert "spec.json: spec: not a weight-space description" in refuse(
        "align", a, b, "-o", tmp_path / "d.pt", "--spec", spec
    )
    missing = refuse("align", a, b, "-o", tmp_path / "d.pt", "--spec", tmp_path / "no.json")
    assert "no.json: cannot be read (No such file or directory)" in missing


def test_a_star_does_not_replace_a_network_of_its_name(document, refuse, tmp_path):
    torch.manual_seed(0)
    for name in ("center", "b"):
        net = MLP((2, 3, 1), activation="relu")
        save_network(tmp_path / f"{name}.safetensors", net.state_dict(), architecture_of(net))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "xy.npz", x=rng.random((20, 2), np.float32), y=rng.random(20, np.float32))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link.safetensors").symlink_to(tmp_path / "center.safetensors")
    known = ["--method", "starlight", "--data", tmp_path / "xy.npz", "--set", "epochs=1"]
    files = [tmp_path / "center.safetensors", tmp_path / "b.safetensors"]
    document("align", *files, "-o", tmp_path / "out", *known)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0-center.safetensors",
        "1-b.safetensors",
        "center.safetensors",
    ]
    assert (tmp_path / "out").stat().st_mode & 0o777 != 0o700, "others may read it"
    linked = [tmp_path / "other" / "link.safetensors", tmp_path / "out" / "1-b.safetensors"]
    message = refuse("align", *linked, "-o", tmp_path, *known, "--overwrite")
    assert "center.safetensors is the input" in message


def test_a_wrong_spec_is_seen_in_the_output(call, tmp_path):
    """A spec of another function: its symmetries are not the network's, and that is said."""
    for name in ("a", "b"):
        net = MLP((2, 8, 1), activation="relu")
        nn.init.normal_(net.layers[0].bias)
        save_network(tmp_path / f"{name}.safetensors", net.state_dict())
    (tmp_path / "spec.json").write_text(WeightSpec.mlp([2, 8, 1], activation="tanh").to_json())
    relu = '{"kind": "mlp", "arguments": {"widths": [2, 8, 1], "activation": "relu"}}'
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-o", tmp_path / "c.safetensors"]
    known = [
        "--spec",
        tmp_path / "spec.json",
        "--architecture",
        relu,
        "--set",
        "symmetries=[permutation, sign]",
    ]
    code, out, err = call("align", *files, *known, "--json")
    assert code == 0
    assert json.loads(out)["max_relative_change"] > 1e-3
    assert "weightspace: warning: the outputs changed by" in err
    assert "more than 1e-05: the networks do not compute what they did" in err


def test_matchers_that_run_the_networks_get_data(document, refuse, zoo, file, tmp_path):
    a, b = f"{zoo}::inr[0]", f"{zoo}::inr[1]"
    out = ["-o", tmp_path / "c.safetensors", "--method", "straight-through"]
    assert refuse("align", a, b, *out) == (
        "--method straight-through: it needs --data, such as digits or FILE.npz"
    )
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "xy.npz", x=rng.random((20, 2), np.float32), y=rng.random(20, np.float32))
    known = [*out, "--data", tmp_path / "xy.npz", "--batch-size", 4, "--samples", 8]
    found = document("align", a, b, *known)
    assert found["max_relative_change"] < 1e-5
    assert found["data"].endswith("xy.npz: 8 items for training and 4 for tests")
    np.savez(tmp_path / "xy.npz", x=rng.random((20, 3), np.float32), y=rng.random(20, np.float32))
    assert "items are of shape [3], 3 values, and the module takes inputs of shape [2], 2 values" in refuse(
        "align", a, b, *known, "--overwrite"
    )


def test_mistakes_are_one_line_before_work(refuse, zoo, tmp_path):
    a, b, out = f"{zoo}::inr[0]", f"{zoo}::inr[1]", tmp_path / "out.safetensors"
    assert "expected a row in 0 .. 39, found 40" in refuse("align", a, f"{zoo}::inr[40]", "-o", out)
    assert "expected at least two, found 1" in refuse("align", a, "-o", out)
    assert "ends in .safetensors, .pt, .pth, found" in refuse("align", a, b, "-o", tmp_path / "out.bin")
    assert "does not exist" in refuse("align", a, b, "-o", tmp_path / "no" / "out.pt")
    assert "method: expected one of " in refuse("align", a, b, "-o", out, "--method", "magic")
    message = refuse("align", a, b, "-o", out, "--set", "speed=3")
    assert message.startswith("--set speed: weight-matching has no such option; expected one of symmetries")
    assert "symmetries: " in refuse("align", a, b, "-o", out, "--set", "symmetries=[rotation]")
    inr = tiny_zoo(networks=4)["inr"]
    inr.weights[1, 0] = np.nan
    diverged = Zoo({"inr": inr}).save(tmp_path / "diverged.h5")
    message = refuse("align", a, f"{diverged}::inr[1]", "-o", out)
    assert "tensor 'layers.0.weight' has 1 values that are NaN or infinite" in message
    other = save_network(tmp_path / "other.safetensors", MLP((2, 4, 1)).state_dict(), {"kind": "mlp"})
    assert "its architecture differs from that of" in refuse("align", a, other, "-o", out)
    assert "is the input" in refuse("align", other, other, "-o", other, "--overwrite")
    assert not out.exists()
