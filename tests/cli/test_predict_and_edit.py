"""``predict`` and ``edit``: tables and zoos that say what the model says, and one line for every mistake."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from weightspace.cli import run
from weightspace.cli._output import counted
from weightspace.nets import MLP
from weightspace.tasks import load_run
from weightspace.testing import tiny_zoo
from weightspace.zoo import SPLITS, Zoo, render

FIT = ["--epochs", "1", "--device", "cpu", "--quiet", "--model"]
CPU = ["--device", "cpu"]
DWS = ["dws", "--set", "model.hidden=4", "--set", "model.layers=1", "--set", "batch_size=8"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


@pytest.fixture(scope="module")
def runs(zoo, tmp_path_factory):
    """One run of each task."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {
        "classes": ["mlp", "--set", "model.hidden=[8]"],
        "psnr": ["mlp", "--set", "model.hidden=[8]", "--task", "regression", "--target", "psnr"],
        "erode": [*DWS, "--task", "editing", "--set", "task.edit=erode"],
    }.items():
        assert run(["train", str(zoo), "-o", str(folder / name), *FIT, *options]) == 0
    return folder


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def outputs_of(path, zoo):
    loaded = load_run(path)
    with torch.no_grad():
        return loaded, loaded.task.readout(loaded.network(Zoo.open(zoo)["inr"].weights_of(slice(None))))


def test_the_table_holds_the_outputs_of_the_model(document, runs, zoo, tmp_path):
    path = tmp_path / "predictions.csv"
    found = document("predict", runs / "classes", zoo, "-o", path, *CPU)
    names = ["probability_0", "probability_1", "probability_2"]
    assert found["columns"] == ["row", "network", "split", "prediction", *names, "target"]
    assert (found["networks"], found["skipped"], found["output"]) == (40, 0, str(path))
    rows, inr = table(path), Zoo.open(zoo)["inr"]
    _, logits = outputs_of(runs / "classes", zoo)
    probabilities = np.array([[float(row[name]) for name in names] for row in rows], dtype=np.float32)
    np.testing.assert_allclose(probabilities, logits.softmax(-1).numpy(), rtol=1e-5)
    assert [int(row["prediction"]) for row in rows] == logits.argmax(-1).tolist()
    assert [int(row["row"]) for row in rows] == list(range(40))
    assert [int(row["network"]) for row in rows] == inr.network.tolist()
    assert [row["split"] for row in rows] == [SPLITS[at] for at in inr.split]
    assert [int(row["target"]) for row in rows] == inr.labels["label"].tolist()


def test_predictions_of_a_split_in_units_of_the_target(document, runs, zoo, tmp_path):
    path = tmp_path / "predictions.csv"
    document("predict", runs / "psnr", zoo, "-o", path, "--split", "test", *CPU)
    rows, inr = table(path), Zoo.open(zoo)["inr"]
    loaded, readout = outputs_of(runs / "psnr", zoo)
    expected = loaded.task.predictions(readout)["prediction"].numpy()[inr.rows_of("test")]
    np.testing.assert_allclose([float(row["prediction"]) for row in rows], expected, rtol=1e-5)
    np.testing.assert_array_equal(
        np.array([float(row["target"]) for row in rows], dtype=np.float32),
        inr.metrics["psnr"][inr.rows_of("test")],
    )
    assert {row["split"] for row in rows} == {"test"}


def test_a_zoo_without_the_target_is_predicted_all_the_same(document, runs, zoo, tmp_path):
    bare = Zoo({"other": replace(Zoo.open(zoo)["inr"], labels={})}).save(tmp_path / "bare.h5")
    for name, path in (("bare", bare), ("full", zoo)):
        document("predict", runs / "classes", path, "-o", tmp_path / f"{name}.csv", *CPU)
    assert "target" not in table(tmp_path / "bare.csv")[0]
    full = [
        {key: value for key, value in row.items() if key != "target"} for row in table(tmp_path / "full.csv")
    ]
    assert table(tmp_path / "bare.csv") == full


def test_the_edited_zoo_renders_as_the_model_says(call, document, runs, zoo, tmp_path):
    path = tmp_path / "edited.h5"
    found = document("edit", runs / "erode", zoo, "-o", path, "--split", "test", *CPU)
    assert (found["task"], found["networks"], found["split"], found["skipped"]) == ("editing", 8, "test", 0)
    edited = Zoo.open(path)
    assert found["digest"] == edited.digest
    _, readout = outputs_of(runs / "erode", zoo)
    expected = readout[Zoo.open(zoo)["inr"].rows_of("test"), 0].numpy()
    np.testing.assert_allclose(render(edited["inr"], np.arange(8), (6, 6)), expected, rtol=1e-4, atol=1e-5)
    said = document("info", path, "--verify")["populations"]["inr"]["protocol"]["edited"]
    assert (said["run"], said["settings"]["edit"]) == ("erode", "erode")
    code, out, _ = call("edit", runs / "erode", zoo, "-o", path, "--overwrite", *CPU)
    assert code == 0
    assert out.startswith(f"{path}: 40 networks, MSE x 100 ")
    assert call("edit", runs / "erode", zoo, "-o", path, "--overwrite", "--quiet", *CPU) == (0, "", "")
    code, out, _ = call("evaluate", runs / "erode", *CPU)
    assert code == 0
    assert "\nwithout the metanetwork: psnr " in out


@pytest.mark.parametrize(
    ("command", "name", "suffix"), [("predict", "classes", "csv"), ("edit", "erode", "h5")]
)
def test_mistakes_are_one_line(refuse, runs, zoo, tmp_path, command, name, suffix):
    output = tmp_path / f"out.{suffix}"
    start = [command, runs / name]
    assert "file not found" in refuse(*start, tmp_path / "no.h5", "-o", output)
    assert "not a run directory" in refuse(command, tmp_path, zoo, "-o", output)
    assert "split: expected one of" in refuse(*start, zoo, "-o", output, "--split", "dev")
    assert "population: expected one of inr" in refuse(*start, zoo, "-o", output, "--population", "cnn")
    assert "directory" in refuse(*start, zoo, "-o", tmp_path / "no" / "out")
    nets = [MLP((2, 3, 1)) for _ in range(10)]
    small = Zoo.from_state_dicts([n.state_dict() for n in nets], module=nets[0]).save(tmp_path / "small.h5")
    assert "tensor 'layers.0.weight' should have shape [8, 2], found [3, 2]" in refuse(
        *start, small, "-o", output
    )
    deep = [MLP((2, 8, 8, 1), activation="tanh") for _ in range(10)]
    tanh = Zoo.from_state_dicts([n.state_dict() for n in deep], module=deep[0]).save(tmp_path / "tanh.h5")
    message = refuse(*start, tanh, "-o", output)
    assert "group 'hidden0' should be" in message
    assert "tanh" in message
    assert not output.exists()
    output.write_text("precious")
    assert "exists already; choose another name or pass --overwrite" in refuse(*start, zoo, "-o", output)
    assert output.read_text() == "precious"
    other = "erode" if command == "predict" else "classes"
    assert "use `weightspace " in refuse(command, runs / other, zoo, "-o", output, "--overwrite")
    assert output.read_text() == "precious"


def test_bad_rows_are_named_or_skipped_and_counted(document, refuse, runs, zoo, tmp_path):
    """By all four commands alike."""
    opened = Zoo.open(zoo)
    weights = np.array(opened["inr"].weights)
    bad = [int(opened["inr"].rows_of(split)[0]) for split in ("train", "test")]
    weights[bad[0], 3], weights[bad[1], 5] = np.nan, np.inf
    path = Zoo({"inr": replace(opened["inr"], weights=weights)}, opened.sources).save(tmp_path / "bad.h5")
    for number, (split, row, command) in enumerate(
        [
            ("train", bad[0], ["train", path, "-o", tmp_path / "run", *FIT, "mlp"]),
            ("test", bad[1], ["evaluate", runs / "classes", path, *CPU]),
            (
                "test",
                bad[1],
                ["predict", runs / "classes", path, "-o", tmp_path / "p", "--split", "test", *CPU],
            ),
            ("test", bad[1], ["edit", runs / "erode", path, "-o", tmp_path / "e", "--split", "test", *CPU]),
        ]
    ):
        message = refuse(*command)
        assert f"NaN or infinite weights in 1 row of split {split}: {row}; --skip-bad leaves" in message, (
            number
        )
        assert document(*command, "--skip-bad")["skipped"] == 1
    assert len(table(tmp_path / "p")) == Zoo.open(tmp_path / "e")["inr"].rows == 7


def test_evaluations_of_another_zoo_stand_beside_those_of_the_own(document, call, runs, zoo, tmp_path):
    other = tiny_zoo(networks=30, seed=7).save(tmp_path / "mine.h5")
    own = document("evaluate", runs / "classes", *CPU)["figure"]
    found = document("evaluate", runs / "classes", other, *CPU)["figure"]
    digest = Zoo.open(other).digest.removeprefix("sha256:")[:8]
    assert (own, found) == (
        str(runs / "classes" / "test.png"),
        str(runs / "classes" / f"test-mine-{digest}.png"),
    )
    code, out, _ = call("evaluate", runs / "classes", *CPU, "--split", "val")
    assert code == 0
    assert out.startswith("mlp on 8 val networks of ")


def test_a_picture_of_several_sources_needs_the_right_one(refuse, call, zoo, tmp_path):
    opened = Zoo.open(zoo)
    sources = {"another": opened.sources["tiny"], "tiny": opened.sources["tiny"]}
    path = Zoo(opened.populations, sources).save(tmp_path / "two.h5")
    message = refuse("show", path, "-o", tmp_path / "two.png")
    assert (
        "stores signals of several sources, another, tiny; the population's protocol should name" in message
    )
    assert not (tmp_path / "two.png").exists()
    named = replace(opened["inr"], protocol={"source": "tiny"})
    assert (
        call("show", Zoo({"inr": named}, sources).save(tmp_path / "one.h5"), "-o", tmp_path / "one.png")[0]
        == 0
    )


def test_the_help_says_which_zoos_can_be_read(call):
    assert "A zoo that the metanetwork can read." in " ".join(call("predict", "--help")[1].split())


def test_counts_name_what_is_counted():
    assert counted(1200, 3, "test") == "1,200 test networks (3 skipped)"
    assert counted(5, 0) == "5 networks"


def test_mistakes_in_the_options_of_a_task_are_one_line(refuse, zoo, tmp_path):
    train = ["train", zoo, "-o", tmp_path / "run", *FIT, "dws", "--task"]
    assert "name one with --target" in refuse(*train, "regression")
    assert "task.edit: input should be 'dilate'" in refuse(*train, "editing", "--set", "task.edit=paint")
    assert "task.los: unknown option of regression; expected one of loss, standardise" in refuse(
        *train, "regression", "--target", "psnr", "--set", "task.los=mse"
    )
    assert "target: task editing predicts none" in refuse(*train, "editing", "--target", "label")
    assert "needs targets in [0, 1]" in refuse(
        *train, "regression", "--target", "psnr", "--set", "task.loss=bce"
    )
    assert "precision: input should be '32'" in refuse(*train, "editing", "--set", "precision=8")
    assert not (tmp_path / "run").exists()
