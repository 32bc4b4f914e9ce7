"""Single networks: rows of zoos, safetensors, state dicts; and what is never unpickled."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weightspace.errors import CheckpointError, OutputError, WeightspaceError, ZooError
from weightspace.nets import MLP, architecture_of
from weightspace.spec import WeightSpec
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo, load_network, open_network, save_network

ARCHITECTURE = {
    "kind": "mlp",
    "arguments": {"widths": [2, 5, 1], "activation": "tanh", "w0": 1.0, "output_offset": 0.0},
}


@pytest.fixture
def net():
    return MLP((2, 5, 1), activation="tanh")


@pytest.fixture
def zoo_path(tmp_path):
    return tiny_zoo(networks=6).save(tmp_path / "zoo.h5")


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_safetensors_keep_the_architecture(net, tmp_path):
    path = save_network(tmp_path / "a.safetensors", net.state_dict(), architecture_of(net))
    network = load_network(path)
    assert network.architecture == ARCHITECTURE
    assert network.name == str(path)
    assert network.spec() == WeightSpec.mlp([2, 5, 1], activation="tanh")
    assert_same({name: network.weights[name] for name in net.state_dict()}, net.state_dict())
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["architecture"]) == ARCHITECTURE


def test_a_row_of_a_zoo_survives_being_saved(zoo_path, tmp_path):
    row = load_network(f"{zoo_path}::inr[3]")
    path = save_network(tmp_path / "row.safetensors", row.weights, row.architecture)
    again = load_network(path)
    assert again.architecture == row.architecture
    for name, tensor in row.weights.items():
        assert torch.equal(again.weights[name], tensor)
    assert path.stat().st_size < 105 * 4 + 2000


def test_a_state_dict_needs_to_be_told_its_architecture(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    network = load_network(tmp_path / "a.pt")
    assert_same(network.weights, net.state_dict())
    with pytest.raises(CheckpointError, match=r"a\.pt: no architecture is stored .* pass --architecture"):
        network.spec()
    assert load_network(tmp_path / "a.pt", ARCHITECTURE).spec() == WeightSpec.mlp(
        [2, 5, 1], activation="tanh"
    )
    wider = {"kind": "mlp", "arguments": {"widths": [2, 6, 1]}}
    message = r"a\.pt: does not fit its architecture: weights: 'layers.0.weight' should end in shape \[6, 2\]"
    with pytest.raises(CheckpointError, match=message):
        load_network(tmp_path / "a.pt", wider).spec()


def test_a_batch_of_networks_is_not_one_network(net, tmp_path):
    save_file(
        {name: torch.stack([t, t]) for name, t in net.state_dict().items()}, tmp_path / "two.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"two\.safetensors: expected one network, found a batch of shape \[2\]"
    ):
        load_network(tmp_path / "two.safetensors", ARCHITECTURE).spec()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"weight": Evil(tmp_path / "pwned")}, tmp_path / "evil.pt")
    message = r"evil\.pt: not a plain state dict that is safe to load: it holds other things"
    with pytest.raises(CheckpointError, match=message) as caught:
        load_network(tmp_path / "evil.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_files_that_hold_no_network_are_refused(net, tmp_path):
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)))
    with pytest.raises(CheckpointError, match=r"noise\.pt: not a plain state dict that is safe to load"):
        load_network(tmp_path / "noise.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt: expected a state dict of tensors, found list"):
        load_network(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "dict.pt")
    message = r"dict\.pt: expected a state dict of tensors, found a dict in which 'epoch' is of type int"
    with pytest.raises(CheckpointError, match=message):
        load_network(tmp_path / "dict.pt")
    path = save_network(tmp_path / "a.safetensors", net.state_dict(), ARCHITECTURE)
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"half\.safetensors: not a readable safetensors file"):
        load_network(tmp_path / "half.safetensors")
    with pytest.raises(
        CheckpointError, match=r"gone\.pt: file not found; expected a \.safetensors or \.pt file"
    ):
        load_network(tmp_path / "gone.pt")


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", '{"kind": ["mlp"]}', '{"kind": "mlp", "arguments": {"w0": "x"}}']
)
def test_a_damaged_architecture_in_a_checkpoint_is_refused(net, tmp_path, text):
    save_file(net.state_dict(), tmp_path / "a.safetensors", {"architecture": text})
    with pytest.raises(
        WeightspaceError, match=r"architecture: |a\.safetensors: not a readable safetensors file"
    ):
        load_network(tmp_path / "a.safetensors").spec()


def test_rows_are_named_from_either_end(zoo_path):
    zoo = Zoo.open(zoo_path)
    for reference, row in [("inr[0]", 0), ("inr[5]", 5), ("inr[-1]", 5), ("inr[-6]", 0), ("[2]", 2)]:
        network = load_network(f"{zoo_path}::{reference}")
        assert_same(network.weights, zoo["inr"].weights_of(row))
        assert network.architecture == zoo["inr"].architecture
        assert network.spec() == zoo["inr"].spec


def test_rows_and_populations_that_do_not_exist(zoo_path, tmp_path):
    for row in (6, -7, 10**9):
        with pytest.raises(
            CheckpointError, match=rf"zoo\.h5::inr\[{row}\]: expected a row in 0 \.\. 5, found {row}"
        ):
            load_network(f"{zoo_path}::inr[{row}]")
    with pytest.raises(ZooError, match="population: expected one of inr, found 'cnn'"):
        load_network(f"{zoo_path}::cnn[0]")
    with pytest.raises(ZooError, match=r"no\.h5: file not found"):
        load_network(f"{tmp_path / 'no.h5'}::inr[0]")
    with pytest.raises(CheckpointError, match=r"file not found; expected .* or ZOO\.h5::POPULATION\[ROW\]"):
        load_network(f"{zoo_path}::inr")
    inr = tiny_zoo(networks=6)["inr"]
    two = Zoo({"a": inr, "b": inr}).save(tmp_path / "two.h5")
    with pytest.raises(ZooError, match="the zoo has several populations, name one of a, b"):
        load_network(f"{two}::[0]")


def test_saving_refuses_an_existing_file_and_other_formats(net, tmp_path):
    path = save_network(tmp_path / "a.safetensors", net.state_dict())
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"a\.safetensors exists already"):
        save_network(path, net.state_dict(), ARCHITECTURE)
    assert path.read_bytes() == before
    save_network(path, net.state_dict(), ARCHITECTURE, overwrite=True)
    assert set(load_file(path)) == set(net.state_dict())
    assert load_network(path).architecture == ARCHITECTURE
    message = r"expected a name that ends in \.safetensors, \.pt, \.pth, found .*a\.bin"
    with pytest.raises(CheckpointError, match=message):
        save_network(tmp_path / "a.bin", net.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_state_dict_that_training_wrapped(net, tmp_path):
    for key in ("state_dict", "model_state_dict", "model"):
        torch.save({"epoch": 3, key: net.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "a.pt")
        assert_same(open_network(tmp_path / "a.pt").weights, net.state_dict())
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(open_network(tmp_path / "old.pth").weights, net.state_dict())


def test_a_state_dict_goes_out_as_it_came_in(net, tmp_path):
    shared = torch.randn(4, 3)
    state = {"head.weight": shared, "embedding.weight": shared, "steps": torch.tensor(3)}
    path = save_network(tmp_path / "out.pt", state)
    found = torch.load(path, weights_only=True)
    assert_same(found, state)
    assert found["head.weight"].data_ptr() == found["embedding.weight"].data_ptr()
    weights = open_network(path).weights
    assert weights.tied("head.weight") == weights.tied("embedding.weight") != weights.tied("steps")
    row = torch.randn(100, 3)[4]  # a view of something larger
    assert save_network(tmp_path / "row.pt", {"w": row}).stat().st_size < 2000


def test_what_a_network_is_called_and_where_it_is(zoo_path, net, tmp_path):
    path = save_network(tmp_path / "a.b.safetensors", net.state_dict())
    (tmp_path / "link.safetensors").symlink_to(path)
    file, link = open_network(path), open_network(tmp_path / "link.safetensors")
    first, last, other = (open_network(f"{zoo_path}::inr[{row}]") for row in (0, 5, 0))
    assert [network.short_name for network in (file, link, last)] == ["a.b", "link", "inr-5"]
    assert file.is_same(link)
    assert first.is_same(other)
    assert not first.is_same(last)
    assert first.digests() == {"zoo.h5": Zoo.open(zoo_path).digest}
    assert file.digests() == {"a.b.safetensors": "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()}
