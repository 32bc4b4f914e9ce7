"""Every benchmark program runs at toy size and writes what it measured."""

import json

import pytest

from weightspace.models import MODELS


@pytest.mark.parametrize(
    "name",
    [
        "batch_loading",
        "group_action",
        "importing",
        "joining",
        "merging_memory",
        "metanetwork_scaling",
        "metanetwork_speed",
        "mixup",
        "mnist_zoo",
        "population_training",
        "tracing",
    ],
)
def test_a_toy_run_writes_a_table_and_json(name, load_program, tmp_path, capsys):
    assert load_program(name).main(["--toy", "-o", str(tmp_path)]) == 0
    table = (tmp_path / f"{name}.md").read_text()
    assert capsys.readouterr().out == table
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(report["rows"]) == sum(line.startswith("| ") for line in table.splitlines()) - 2
    assert report["setting"]["command"].startswith(f"python benchmarks/{name}.py --toy")
    numbers = [value for row in report["rows"] for value in row.values() if isinstance(value, float)]
    assert numbers
    assert min(numbers) > 0


def test_every_fault_ends_with_the_same_digest(load_program, tmp_path, capsys):
    program = load_program("faults")
    assert program.main(["--toy", "-o", str(tmp_path)]) == 0
    table = (tmp_path / "faults.md").read_text()
    assert capsys.readouterr().out == table
    report = json.loads((tmp_path / "faults.json").read_text())
    assert len(report["rows"]) >= 3
    assert all(row["is_equal"] and row["times"] >= 1 for row in report["rows"])
    assert report["rows"][0]["times"] == 2
    log = (tmp_path / "faults.log").read_text()
    assert log.count("left behind []") == len(report["rows"])
    assert report["setting"]["digest"] in log


def trained_at_toy_size(program, tmp_path):
    paths = ["--zoo", str(tmp_path / "z.h5"), "--runs", str(tmp_path / "runs"), "-o", str(tmp_path)]
    assert program.main(["--toy", *paths]) == 0


def test_classification_trains_every_family(load_program, tmp_path):
    program = load_program("classification")
    trained_at_toy_size(program, tmp_path)
    report = json.loads((tmp_path / "mnist_classification.json").read_text())
    assert [row["title"] for row in report["rows"]] == list(program.FAMILIES)
    assert {row["config"]["model"] for row in report["rows"]} == set(MODELS)
    assert all(0 <= row["accuracy"] <= 1 for row in report["rows"])
    assert str(tmp_path) not in json.dumps(report), "no local path in a result"
    assert (tmp_path / "mnist_classification_dws_test.png").stat().st_size > 5000


def test_editing_trains_every_row(load_program, tmp_path):
    program = load_program("editing")
    trained_at_toy_size(program, tmp_path)
    report = json.loads((tmp_path / "editing.json").read_text())
    assert [(row["edit"], row["config"]["model"]) for row in report["rows"]] == [
        row[:2] for row in program.ROWS
    ]
    assert all(0 < row["error"] < 100 and 0 < row["before"] < 100 for row in report["rows"])
    assert (tmp_path / "editing_dilate_dws.png").stat().st_size > 5000


def test_cards_hold_the_quantiles_of_what_was_made(load_program, tmp_path):
    assert load_program("recipe_cards").main(["--toy", "-o", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "recipe_cards.json").read_text())["rows"]
    assert (row["recipe"], row["networks"], row["whole"]) == ("digits-mlp", 2, 1000)
    assert 0 <= row["q0"] <= row["q50"] <= row["q100"] <= 1
    assert row["hours"] == pytest.approx(1000 / row["per_second"] / 3600)


def test_accuracy_is_predicted_within_and_across_architectures(load_program, tmp_path):
    trained_at_toy_size(load_program("accuracy_prediction"), tmp_path)
    rows = json.loads((tmp_path / "accuracy_prediction.json").read_text())["rows"]
    told = [(row["title"], row["trained"], row["tested"]) for row in rows]
    assert told == [
        ("statistics + trees", "cnn-000", "cnn-000"),
        ("64 probes", "cnn-000", "cnn-000"),
        ("64 probes", "cnn-000", "cnn-001"),
        ("64 probes", "all", "all"),
    ]
    # what so few networks taught may be one number for all, which has no ranks; R2 is always there
    assert all(row["r2_low"] < row["r2_high"] and row["r2"] < 1 for row in rows)


def test_embeddings_are_probed_on_both_zoos(load_program, tmp_path):
    program = load_program("contrastive")
    assert program.main(["--toy", "--work", str(tmp_path / "work"), "-o", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "contrastive.json").read_text())
    expected = [*program.RAW, program.UNTRAINED, *program.CONTRASTIVE, program.SUPERVISED]
    assert [row["title"] for row in report["rows"]] == expected
    for row in report["rows"]:
        assert 0 <= row["digit_accuracy"] <= 1
        for label in ("frequency", "amplitude"):
            # R2 and the squared error of one test split say the same
            assert row[f"{label}_mse"] / (1 - row[f"{label}_r2"]) == pytest.approx(
                report["rows"][0][f"{label}_mse"] / (1 - report["rows"][0][f"{label}_r2"]), rel=1e-3
            )
    assert str(tmp_path) not in json.dumps(report), "no local path in a result"


def test_the_alignment_study_measures_every_part_once(load_program, tmp_path, capsys):
    program = load_program("alignment_study")
    arguments = ["--toy", "--runs", str(tmp_path / "runs"), "-o", str(tmp_path)]
    assert program.main(arguments) == 0
    assert "digits-resnet-batch-0.25" in capsys.readouterr().out
    first = (tmp_path / "alignment_study.json").read_text()
    assert program.main(arguments) == 0
    table = (tmp_path / "alignment_study.md").read_text()
    assert capsys.readouterr().out == table, "nothing was trained or measured again"
    assert (tmp_path / "alignment_study.json").read_text() == first
    assert str(tmp_path) not in first, "no local path in a result"
    rows = json.loads(first)["rows"]
    assert {row["part"] for row in rows} == set(program.PARTS)
    barriers = [row for row in rows if row["part"] in ("barriers", "resnets")]
    assert {row["repair"] for row in barriers} == {"none", "batch-norm", "repair"}
    assert all(row["train_loss_barrier"] >= 0 and row["test_accuracy_barrier"] >= 0 for row in barriers)
    matched = [row for row in barriers if row["method"] == "weight-matching"]
    assert all(row["distance_after"] < row["distance_before"] for row in matched)
    for part in ("barriers", "resnets", "many", "star", "singular", "surface"):
        assert (tmp_path / f"alignment_study_{part}.png").stat().st_size > 5000
