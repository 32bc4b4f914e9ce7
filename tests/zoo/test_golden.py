"""The golden file of format version 1: read for ever, and noticed when the format changes."""

from pathlib import Path

import h5py
import numpy as np
import torch

from weightspace.spec import WeightSpec
from weightspace.zoo import Zoo, verify_digest

GOLDEN = Path(__file__).parent / "golden" / "zoo-v1.h5"
DIGEST = "sha256:4615121bd0d0c2a7f26914a305df186e5a39f1e29ff11f7b900d7b97b83e7586"
SPEC = GOLDEN.with_suffix(".spec.json").read_text().rstrip("\n")


def test_its_values_are_read_literally():
    zoo = Zoo.open(GOLDEN)
    assert zoo.format_version == 1
    assert list(zoo) == ["half", "inr"]
    assert zoo.recipe == {"name": "golden", "seed": 7}
    inr = zoo["inr"]
    assert (inr.rows, inr.networks, inr.dtype) == (6, 6, "float32")
    np.testing.assert_array_equal(inr.weights, (np.arange(630).reshape(6, 105) - 300) / 64)
    assert inr.network.tolist() == [0, 1, 2, 3, 4, 5]
    assert inr.step.tolist() == [5] * 6
    assert inr.source.tolist() == [0, 0, 1, 1, 2, 2]
    assert inr.view.tolist() == [0, 1, 0, 1, 0, 1]
    assert inr.split.tolist() == [2, 2, 0, 0, 0, 0]
    np.testing.assert_array_equal(inr.metrics["psnr"], np.array([20, 24.5, np.nan, 28, 32, 40], np.float32))
    assert inr.labels["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert inr.hyperparameters["learning_rate"].tolist() == [n / 1024 for n in range(1, 7)]
    arguments = {"widths": [2, 8, 8, 1], "activation": "sine", "w0": 30.0, "output_offset": 0.5}
    assert inr.architecture == {"kind": "mlp", "arguments": arguments}
    assert inr.protocol == {"preset": "none", "w0": 30.0}
    source = zoo.sources["tiny"]
    assert source.items.dtype == np.uint8
    np.testing.assert_array_equal(source.items.ravel(), np.arange(108))
    assert source.index.tolist() == [0, 1, 2]


def test_its_half_precision_is_read():
    half = Zoo.open(GOLDEN)["half"]
    assert (half.dtype, half.weights.dtype) == ("float16", np.float16)
    assert torch.equal(half.read(slice(None)), (torch.arange(630.0).view(6, 105) - 300) / 64)


def test_its_tensors_are_where_they_were():
    weights = Zoo.open(GOLDEN)["inr"].weights_of(0)
    assert weights["layers.0.weight"][:2].tolist() == [[-300 / 64, -299 / 64], [-298 / 64, -297 / 64]]
    assert weights["layers.0.bias"][0].item() == (16 - 300) / 64
    assert weights["layers.1.weight"][1, 2].item() == (24 + 10 - 300) / 64
    assert weights["layers.2.weight"].tolist() == [[(96 + n - 300) / 64 for n in range(8)]]
    assert weights["layers.2.bias"].item() == (104 - 300) / 64


def test_its_digest_is_computed_as_before():
    assert Zoo.open(GOLDEN).digest == DIGEST
    assert verify_digest(GOLDEN) == DIGEST


def test_its_spec_is_the_same_text():
    with h5py.File(GOLDEN) as file:
        assert file["populations/inr"].attrs["spec"] == SPEC
    spec = WeightSpec.from_json(SPEC)
    assert spec == Zoo.open(GOLDEN)["inr"].spec == WeightSpec.mlp([2, 8, 8, 1], activation="sine", w0=30.0)
    assert spec.to_json() == SPEC


def test_what_is_written_today_is_the_same_file(tmp_path):
    """All paths, types, layouts and attributes, but for the note on who wrote it."""
    zoo = Zoo.open(GOLDEN)
    again = Zoo(zoo.populations, zoo.sources, zoo.recipe).save(tmp_path / "again.h5")
    assert contents(again) == contents(GOLDEN)


def contents(path):
    found = {}
    with h5py.File(path) as file:

        def note(name, item):
            attributes = {key: value for key, value in item.attrs.items() if key != "created_by"}
            is_data = isinstance(item, h5py.Dataset)
            data = (item.dtype.str, item.shape, item.chunks, item[()].tobytes()) if is_data else None
            found[name] = (attributes, data)

        note("/", file)
        file.visititems(note)
    return found
