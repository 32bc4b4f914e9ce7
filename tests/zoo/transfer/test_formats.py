"""Every layout, copied faithfully: each network computes in the zoo what it computed in its file."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

import weightspace as ws
from weightspace.nets import build, evaluate_batch
from weightspace.zoo import IMPORTERS, SPLITS, Zoo, import_zoo

COORDINATES = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
IMAGES = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(2))
COLOURS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def imported(tmp_path):
    def one(format, source, **options):
        report = import_zoo(format, source.folder, tmp_path / "zoo.h5", progress=False, **options)
        zoo = Zoo.open(tmp_path / "zoo.h5")
        assert report.digest == zoo.digest == ws.zoo.verify_digest(tmp_path / "zoo.h5")
        assert report.rows == sum(zoo[name].rows for name in zoo)
        assert zoo.recipe["skipped"] == report.skipped
        assert zoo.recipe["name"] == f"import {format}"
        assert all(zoo[name].protocol["imported_from"] == format for name in zoo)
        assert not (tmp_path / "zoo.h5.parts").exists()
        return zoo

    return one


def outputs_of(population, inputs):
    with torch.no_grad():
        return evaluate_batch(build(population.architecture), population.weights_of(slice(None)), inputs)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def rebuilt(weights, images):
    """Their small CNN, by hand."""
    (w0, b0), (w1, b1), (w2, b2), (w3, b3), (w4, b4) = [
        (weights[f"module_list.{at}.weight"], weights[f"module_list.{at}.bias"]) for at in (0, 3, 6, 9, 11)
    ]
    x = functional.max_pool2d(functional.conv2d(images, w0, b0), 2).tanh()
    x = functional.max_pool2d(functional.conv2d(x, w1, b1), 2).tanh()
    x = functional.conv2d(x, w2, b2).tanh().flatten(1)
    return functional.linear(functional.linear(x, w3, b3).tanh(), w4, b4)


def splits_of(population):
    return [SPLITS[at] for at in population.split]


# -- coordinate networks -----------------------------------------------------------------------------------


def test_dwsnets(imported, dwsnets):
    inr = imported("dwsnets", dwsnets)["inr"]
    assert inr.source.tolist() == [*range(8), *range(60_000, 60_004)]
    keys = [(item >= 60_000, item % 60_000) for item in inr.source]
    for row, output in enumerate(outputs_of(inr, COORDINATES)):
        assert_same(output, dwsnets.outputs[keys[row]])
    assert inr.labels["label"].tolist() == [n % 3 for n in range(8)] + [n % 2 for n in range(8, 12)]
    assert inr.architecture["arguments"] == {
        "widths": [2, 8, 6, 1], "activation": "sine", "w0": 30.0, "output_offset": 0.5
    }  # fmt: skip
    assert (inr.protocol["w0"], inr.protocol["output_offset"]) == (30.0, 0.5)


def test_dwsnets_test_images_stay_test_images(imported, dwsnets):
    splits = splits_of(imported("dwsnets", dwsnets)["inr"])
    assert splits[8:] == ["test"] * 4
    assert sorted(splits[:8]) == ["train"] * 7 + ["val"]


def test_dwsnets_splits_of_another_machine(imported, dwsnets, dwsnets_splits):
    inr = imported("dwsnets", dwsnets, splits=dwsnets_splits)["inr"]
    order = sorted(range(12), key=lambda at: f"mnist_png_{'training' if at < 8 else 'testing'}_"
                   f"{at % 3 if at < 8 else at % 2}_{at if at < 8 else at - 8}")  # fmt: skip
    expected = {
        at: "test" if at >= 8 else "val" if place % 4 == 3 else "train" for place, at in enumerate(order)
    }
    assert splits_of(inr) == [expected[at] for at in range(12)]


def test_dwsnets_options(imported, dwsnets):
    zoo = imported(
        "dwsnets", dwsnets,
        options={"activation": "tanh", "output_offset": 0.0, "population": "mnist", "train_items": 100, "seed": 3},
    )  # fmt: skip
    assert list(zoo) == ["mnist"]
    assert zoo["mnist"].source.tolist() == [*range(8), *range(100, 104)]
    assert zoo["mnist"].spec == ws.WeightSpec.mlp([2, 8, 6, 1], "tanh")
    assert zoo.recipe["options"]["seed"] == 3


def test_augmentation_keeps_views_and_reads_labels_from_the_files(imported, augmentation):
    inr = imported("augmentation", augmentation)["inr"]
    keys = list(zip(inr.source.tolist(), inr.view.tolist(), strict=True))
    assert sorted(keys) == sorted(augmentation.outputs)
    for key, output in zip(keys, outputs_of(inr, COORDINATES), strict=True):
        assert_same(output, augmentation.outputs[key])
    assert inr.labels["label"].tolist() == [item + 4 for item, _ in keys]
    by_item = {
        item: {s for (i, _), s in zip(keys, splits_of(inr), strict=True) if i == item} for item in range(3)
    }
    assert all(len(splits) == 1 for splits in by_item.values())


@pytest.mark.parametrize("wrapped", ["tensor", "nested"])
def test_augmentation_takes_labels_in_tensors_and_states_in_states(imported, augmentation, wrapped):
    for path in augmentation.folder.rglob("*.pth"):
        state = torch.load(path)
        label = state.pop("label")
        torch.save({**state, "label": torch.tensor([label])} if wrapped == "tensor" else
                   {"state_dict": state, "label": label}, path)  # fmt: skip
    inr = imported("augmentation", augmentation)["inr"]
    assert inr.labels["label"].tolist() == (inr.source + 4).tolist()
    assert_same(outputs_of(inr, COORDINATES)[0], augmentation.outputs[int(inr.source[0]), int(inr.view[0])])


def test_nfn(imported, nfn):
    inr = imported("nfn", nfn)["inr"]
    keys = list(zip(inr.source.tolist(), inr.view.tolist(), strict=True))
    assert keys == sorted(nfn.outputs), "aug10 is a later view than aug1"
    for key, output in zip(keys, outputs_of(inr, COORDINATES), strict=True):
        assert_same(output, nfn.outputs[key])
    assert splits_of(inr) == ["train"] * 6 + ["val"] * 6 + ["test"] * 6
    assert inr.labels["label"].tolist() == [n % 3 for n in range(6) for _ in range(3)]
    assert inr.architecture["arguments"]["output_offset"] == 0.0


def test_nfn_draws_splits_on_request(imported, nfn):
    inr = imported("nfn", nfn, options={"split_at": None, "fractions": (0.5, 0.5, 0.0)})["inr"]
    assert sorted(splits_of(inr)) == ["train"] * 9 + ["val"] * 9


# -- classifiers -------------------------------------------------------------------------------------------


def test_small_cnn_zoo(imported, small_cnn_zoo):
    zoo = imported("small-cnn-zoo", small_cnn_zoo)
    assert list(zoo) == ["cnn-relu", "cnn-tanh"]
    for name, rows in (("cnn-relu", [0, 1, 4, 5]), ("cnn-tanh", [2, 3])):
        population = zoo[name]
        for row, output in zip(rows, outputs_of(population, IMAGES), strict=True):
            assert_same(output, small_cnn_zoo.outputs[row])
        assert population.metrics["test_accuracy"] == pytest.approx([0.1 + row / 10 for row in rows])
        assert population.step.tolist() == [10 * (row % 2) for row in rows]
    relu = zoo["cnn-relu"]
    assert (relu.network.tolist(), relu.source.tolist()) == ([0, 0, 1, 1], [0, 2])
    assert relu.protocol["choices"]["optimizer"] == ["adam", "sgd"]
    assert relu.hyperparameters["optimizer"].tolist() == [1, 0]
    assert relu.hyperparameters["learning_rate"] == pytest.approx([0.1, 0.3])
    assert relu.hyperparameters["laststep"].tolist() == [86, 86]
    assert ws.zoo.rows_where(relu, "optimizer == 'adam' and step == last").tolist() == [3]
    assert {group.activation for group in relu.spec.groups.values()} == {"relu"}


def test_small_cnn_zoo_splits_are_of_networks(imported, small_cnn_zoo, tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["/cns/x/0", "x/2"], "test": ["1"]}))
    zoo = imported("small-cnn-zoo", small_cnn_zoo, splits=tmp_path / "splits.json")
    assert (splits_of(zoo["cnn-relu"]), splits_of(zoo["cnn-tanh"])) == (["train", "train"], ["test"])


def test_cnn_wild_park(imported, cnn_wild_park):
    zoo = imported("cnn-wild-park", cnn_wild_park)
    assert list(zoo) == ["cnn-000", "cnn-001"]
    for name, trials in (("cnn-000", [0, 2]), ("cnn-001", [1])):
        population = zoo[name]
        keys = [(trial, step) for trial in trials for step in (3, 12)]
        for key, output in zip(keys, outputs_of(population, COLOURS), strict=True):
            assert_same(output, cnn_wild_park.outputs[key])
        assert population.metrics["score"] == pytest.approx([trial + step / 100 for trial, step in keys])
        assert population.step.tolist() == [step for _, step in keys]
        assert population.hyperparameters["lr"] == pytest.approx([0.01 * (trial + 1) for trial in trials])
    arguments = zoo["cnn-000"].architecture["arguments"]
    assert (arguments["residual"], arguments["shortcut"]) == ([-1, -1, 0], "shared")
    assert zoo["cnn-001"].source.tolist() == [1]


def test_cnn_wild_park_lists_by_split(imported, cnn_wild_park):
    listed = json.loads((cnn_wild_park.folder / "scores.json").read_text())
    columns = [
        {key: [row[key] for row in rows] for key in listed[0]}
        for rows in (listed[:2], listed[2:4], listed[4:])
    ]
    document = dict(zip(("train", "val", "test"), columns, strict=True))
    (cnn_wild_park.folder / "scores.json").write_text(json.dumps(document))
    zoo = imported("cnn-wild-park", cnn_wild_park)
    assert (splits_of(zoo["cnn-000"]), splits_of(zoo["cnn-001"])) == (["train", "test"], ["val"])


def test_cnn_wild_park_with_an_activation_that_we_do_not_have_keeps_its_permutations(imported, cnn_wild_park):
    for path in cnn_wild_park.folder.glob("trial_1*/*/checkpoint.pt"):
        state = torch.load(path)
        state["config"]["activation"] = "mish"
        torch.save(state, path)
    park = imported("cnn-wild-park", cnn_wild_park)["cnn-001"]
    assert park.architecture is None
    assert [group.size for group in park.spec.groups.values()] == [4, 6]
    assert not park.spec.scalings
    assert park.protocol["activation"] == "mish"


def test_modelzoos(imported, modelzoos):
    cnn = imported("modelzoos", modelzoos)["cnn"]
    assert (cnn.network.tolist(), cnn.step.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2] * 2)
    for row in range(6):
        output = rebuilt(cnn.weights_of(row), IMAGES[:, :, :28, :28])
        assert_same(output, modelzoos.outputs[row // 3, row % 3])
    assert np.isnan(cnn.metrics["test_acc"][[0, 3]]).all(), "epoch 0 has no line"
    assert cnn.metrics["test_acc"][[1, 2, 4, 5]] == pytest.approx([0.2, 0.4, 0.2, 0.4])
    assert set(cnn.metrics) == {"test_acc", "train_loss"}
    assert cnn.hyperparameters["optim::lr"] == pytest.approx([3e-4, 6e-4])
    assert cnn.protocol["choices"]["model::nlin"] == ["tanh"]
    assert cnn.protocol["step_unit"] == "epochs"
    assert cnn.architecture is None


def test_modelzoos_claims_only_what_holds(imported, modelzoos):
    """Pooling is not in the files: permutations hold wherever it is, sign flips do not hold before a maximum."""
    cnn = imported("modelzoos", modelzoos)["cnn"]
    element = cnn.spec.random_element(generator=torch.Generator().manual_seed(0))
    moved = cnn.spec.act(element, cnn.weights_of(2))
    assert [group.size for group in cnn.spec.groups.values()] == [8, 6, 4, 20]
    assert_same(rebuilt(moved, IMAGES[:, :, :28, :28]), modelzoos.outputs[0, 2])
    assert not cnn.spec.scalings


def test_modelzoos_mlps_are_built(imported, modelzoos):
    for path in modelzoos.folder.rglob("checkpoints"):
        torch.save({"module_list.0.weight": torch.randn(5, 4), "module_list.0.bias": torch.randn(5),
                    "module_list.2.weight": torch.randn(3, 5), "module_list.2.bias": torch.randn(3)}, path)  # fmt: skip
    zoo = imported("modelzoos", modelzoos)
    assert zoo["mlp-tanh"].architecture["arguments"]["widths"] == [4, 5, 3]
    assert zoo["mlp-tanh"].spec == ws.WeightSpec.mlp([4, 5, 3], "tanh")


def test_modelzoos_residual_networks_claim_nothing(imported, modelzoos):
    for path in modelzoos.folder.rglob("checkpoints"):
        torch.save({"conv1.weight": torch.randn(4, 1, 3, 3), "bn1.running_mean": torch.randn(4),
                    "bn1.num_batches_tracked": torch.tensor(3), "fc.weight": torch.randn(2, 4)}, path)  # fmt: skip
    population = imported("modelzoos", modelzoos)["networks"]
    assert not population.spec.groups
    assert population.spec.tensors["bn1.running_mean"].kind == "statistic"
    assert population.spec.num_parameters == 36 + 4 + 8


# -- a folder of one's own ---------------------------------------------------------------------------------


def test_folder(imported, folder):
    zoo = imported("folder", folder, options={"activation": "tanh", "hyperparameters": ["lr"]})
    mine = zoo["networks"]
    for name, output in zip(sorted(folder.outputs), outputs_of(mine, COORDINATES), strict=True):
        assert_same(output, folder.outputs[name])
    assert mine.labels["label"].tolist() == [0, 1, 0, 1]
    assert mine.protocol["choices"] == {"colour": ["blue", "red"]}
    assert mine.labels["colour"].tolist() == [1, 0, 1, 0]
    assert mine.metrics["accuracy"] == pytest.approx([0.5, 0.625, 0.75, 0.875])
    assert mine.hyperparameters["lr"] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert splits_of(mine) == ["train", "val", "test", "test"]


def test_folder_without_a_word_about_the_network_claims_nothing(imported, folder):
    mine = imported("folder", folder)["networks"]
    assert not mine.spec.groups
    assert list(mine.spec.tensors) == ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]
    assert "none are claimed" in mine.protocol["symmetries"]


@pytest.mark.parametrize("document", ["rows", "columns", "by path"])
def test_folder_with_json(imported, folder, document):
    names = sorted(folder.outputs)
    (folder.folder / "table.csv").unlink()
    found = {
        "rows": [{"file": name, "label": at} for at, name in enumerate(names)],
        "columns": {"path": names, "label": [0, 1, 2, 3]},
        "by path": {name: {"label": at} for at, name in enumerate(names)},
    }[document]
    (folder.folder / "labels.json").write_text(json.dumps(found))
    assert imported("folder", folder)["networks"].labels["label"].tolist() == [0, 1, 2, 3]


def test_folder_of_our_own_checkpoints_knows_the_architecture(imported, tmp_path):
    net = ws.nets.CNN((1, 8, 8), (3, 4), 2, kernel_size=3)
    source = tmp_path / "own"
    source.mkdir()
    for number in range(3):
        ws.zoo.save_network(source / f"{number}.safetensors", net.state_dict(), ws.nets.architecture_of(net))
    population = imported("folder", type("S", (), {"folder": source}))["networks"]
    assert population.architecture == ws.nets.architecture_of(net)
    assert population.spec == ws.zoo.spec_of(net)


def test_folder_with_checkpoints_items_and_views(imported, tmp_path):
    source = tmp_path / "own"
    source.mkdir()
    lines = ["path,network,step,item,view,score"]
    for at, (network, step, item, view) in enumerate(
        [("a", 1, "cat", 0), ("a", 2, "cat", 0), ("b", 2, "cat", 1)]
    ):
        save_file({"w": torch.full((2,), float(at))}, source / f"{at}.safetensors")
        lines.append(f"{at}.safetensors,{network},{step},{item},{view},{at}.5")
    (source / "t.csv").write_text("\n".join(lines))
    found = imported("folder", type("S", (), {"folder": source}))["networks"]
    assert (found.network.tolist(), found.step.tolist()) == ([0, 0, 1], [1, 2, 2])
    assert (found.source.tolist(), found.view.tolist()) == ([0, 0], [0, 1])
    assert found.metrics["score"].tolist() == [0.5, 1.5, 2.5]


def test_half_precision_and_double_become_float32(imported, tmp_path):
    source = tmp_path / "own"
    source.mkdir()
    exact = torch.tensor([0.5, -1.25])
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        torch.save({"w": exact.to(dtype)}, source / f"{str(dtype)[6:]}.pt")
    found = imported("folder", type("S", (), {"folder": source}))["networks"]
    assert np.array_equal(found.weights, exact.numpy()[None].repeat(3, 0))


def test_every_importer_says_what_it_expects():
    assert all(kind.expects and kind.__doc__ for kind in IMPORTERS.values())
