"""Safetensors, single and sharded, read and written one tensor at a time."""

import errno
import gc
import json
import struct
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weightspace.errors import CheckpointError, OutputError
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo, bytes_of, meta_of, open_network, save_network, write_tensors


def all_types():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator)
    floats = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    whole = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
    return {
        **{name: values.to(getattr(torch, name)) for name in floats},
        **{name: torch.arange(7).to(getattr(torch, name)) for name in whole},
        "complex": torch.view_as_complex(values[:, :2].contiguous()),
        "mask": values > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": values.T,
    }


def same(a, b):
    same_type = a.dtype == b.dtype and a.shape == b.shape
    return same_type and bool((a.double() == b.double()).all()) if not a.is_complex() else torch.equal(a, b)


def test_every_type_survives_and_the_library_of_the_format_reads_it(tmp_path):
    tensors = all_types()
    path = save_network(tmp_path / "a.safetensors", tensors, metadata={"note": "é"})
    weights, theirs = open_network(path).weights, load_file(path)
    assert set(weights) == set(tensors) == set(theirs)
    for name, tensor in tensors.items():
        assert same(weights[name], tensor), name
        assert same(theirs[name], tensor), name
        assert (weights.meta(name).shape, weights.meta(name).dtype) == (tensor.shape, tensor.dtype)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    theirs_path = tmp_path / "theirs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, theirs_path)
    again = open_network(theirs_path).weights
    assert all(same(again[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_is_the_readers_own(tmp_path):
    path = save_network(tmp_path / "a.safetensors", {"w": torch.ones(3), "b": torch.ones(2)})
    before = path.read_bytes()
    weights = open_network(path).weights
    taken = weights["w"]
    taken.zero_()
    assert weights["w"].tolist() == [1.0, 1.0, 1.0]
    assert path.read_bytes() == before
    del weights
    gc.collect()
    path.unlink()
    assert taken.tolist() == [0.0, 0.0, 0.0], "it outlives the file"


def test_tensors_that_another_writer_did_not_align(tmp_path):
    header = json.dumps(
        {
            "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "w": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
        }
    ).encode()
    data = struct.pack("<Bdd", 7, 1.5, -2.5)
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    weights = open_network(tmp_path / "odd.safetensors").weights
    assert list(weights) == ["flag", "w"]
    assert weights["w"].tolist() == [1.5, -2.5]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    state = {f"layer.{number}": torch.randn(3, number + 1) for number in range(4)}
    places = {name: f"model-0000{1 + number // 2}-of-00002.safetensors" for number, name in enumerate(state)}
    for place in set(places.values()):
        part = {name: state[name] for name in state if places[name] == place}
        save_file(part, folder / place, {"architecture": '{"kind": "mlp"}'})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, state


def test_shards_are_one_network(shards):
    folder, state = shards
    for reference in (folder, folder / "model.safetensors.index.json"):
        network = open_network(reference)
        assert list(network.weights) == list(state)
        assert all(torch.equal(network.weights[name], state[name]) for name in state)
        assert network.weights.meta("layer.2").shape == (3, 3)
        assert network.architecture == {"kind": "mlp"}
        assert len(network.files) == 3
        assert set(network.digests()) == {path.name for path in folder.iterdir()}
        assert network.short_name == "model"


def test_shards_that_contradict_their_index(shards):
    folder, _ = shards
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def refused(change):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], **change}}))
        with pytest.raises(CheckpointError) as caught:
            open_network(folder)
        return str(caught.value)

    second = "model-00002-of-00002.safetensors"
    assert "the file gone.safetensors that it names is missing" in refused({"x": "gone.safetensors"})
    assert f"tensor 'x' should be in {second}, which has none" in refused({"x": second})
    assert "tensor 'layer.0' should be in model-00002" in refused({"layer.0": second})
    for outside in ("../a", "..", "/a", ""):
        assert f"expected names of files beside it, found {outside!r}" in refused({"x": outside})
    assert "that it names is missing" in refused({"x": "a" * 300})
    places = {name: place for name, place in index["weight_map"].items() if name != "layer.1"}
    path.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"tensor 'layer\.1' of model-00001.* is not listed in it"):
        open_network(folder)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not a readable index of safetensors files"):
        open_network(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="expected one checkpoint in this folder, found model-00001"):
        open_network(folder)
    for shard in folder.iterdir():
        shard.unlink()
    with pytest.raises(
        CheckpointError, match=r"expected a folder with model\.safetensors\.index\.json or one"
    ):
        open_network(folder)


@pytest.mark.parametrize("cut", [4, 30, -1])
def test_truncated_files_are_refused_before_anything_is_read(tmp_path, cut):
    path = save_network(tmp_path / "a.safetensors", {"w": torch.ones(30)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a readable safetensors file") as caught:
        open_network(path)
    assert "\n" not in str(caught.value)


# -- writing -----------------------------------------------------------------------------------------------


def layout_of(tensors):
    return {name: meta_of(tensors, name) for name in tensors}


def test_tensors_come_in_any_order_and_each_is_let_go(tmp_path):
    tensors = {f"t{number}": torch.full((number + 1,), float(number)) for number in range(5)}
    alive = []

    def stream():
        for name in reversed(tensors):
            assert not any(reference() is not None for reference in alive), "the one before is gone"
            tensor = tensors[name].clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    path = write_tensors(tmp_path / "a.safetensors", layout_of(tensors), stream())
    found = load_file(path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert sum(bytes_of(meta) for meta in layout_of(tensors).values()) == 60


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("problem", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            OutputError,
            r"could not be written \(No space left",
        ),
    ],
)
def test_what_goes_wrong_leaves_the_old_file_and_nothing_else(tmp_path, suffix, problem, raised, message):
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    path = save_network(tmp_path / f"out.{suffix}", tensors)
    before = path.read_bytes()

    def stream():
        yield "a", torch.zeros(4)
        raise problem

    with pytest.raises(raised, match=message):
        write_tensors(path, layout_of(tensors), stream(), overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_disk_that_is_too_small_is_told_before_work(tmp_path):
    huge = {"w": torch.empty(2**50, device="meta")}
    with pytest.raises(OutputError, match=r"it takes 4\.5e\+06 GB, .* GB are free there"):
        write_tensors(tmp_path / "a.safetensors", huge, iter([]))
    assert not list(tmp_path.iterdir())


def test_types_that_the_format_lacks_and_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"safetensors has no type for 'z', torch\.complex128"):
        save_network(tmp_path / "a.safetensors", {"z": torch.zeros(2, dtype=torch.complex128)})
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(
        OutputError, match=r"expected the name of a file, found the directory .*d\.safetensors"
    ):
        save_network(tmp_path / "d.safetensors", {"z": torch.zeros(2)}, overwrite=True)


def test_state_dicts_that_hold_no_plain_tensors(tmp_path):
    path = tmp_path / "a.pt"
    for tensor, kind in (
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "without values"),
    ):
        torch.save({"b": torch.ones(1), "w": tensor}, path)
        with pytest.raises(CheckpointError, match=rf"a\.pt: tensor 'w': expected a dense .* that is {kind}"):
            open_network(path)
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(CheckpointError, match=r"a\.pt: not a readable file of PyTorch, it may be truncated"):
        open_network(path)
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="expected the tensors of a network, found none"):
        open_network(tmp_path / "none.safetensors")


def test_rows_of_two_populations_are_two_networks(tmp_path):
    inr = tiny_zoo(networks=4)["inr"]
    path = Zoo({"a": inr, "b": inr}).save(tmp_path / "two.h5")
    first, other, last, third = (open_network(f"{path}::{row}") for row in ("a[0]", "b[0]", "a[-1]", "a[3]"))
    assert first.is_same(first)
    assert last.is_same(third)
    assert not first.is_same(other)
