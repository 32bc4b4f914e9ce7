"""What a user may hand over: one sentence that names the file, before work starts where that can be known."""

import csv
import gzip
import json
import os
import shutil

import numpy as np
import pytest
import torch

from weightspace.errors import ConfigError, DataError, OutputError, WeightspaceError
from weightspace.zoo import IMPORTERS, Zoo, import_zoo


@pytest.fixture
def refused(tmp_path):
    """The message, with nothing left behind under the final name."""

    def one(format, folder, error=DataError, **arguments):
        with pytest.raises(WeightspaceError) as caught:
            import_zoo(format, folder, tmp_path / "bad.h5", progress=False, **arguments)
        assert isinstance(caught.value, error)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "bad.h5").exists()
        return str(caught.value)

    return one


@pytest.fixture
def skipped(tmp_path):
    """The report and the zoo of an import that leaves out what is bad."""

    def one(format, folder, **arguments):
        report = import_zoo(format, folder, tmp_path / "good.h5", skip_bad=True, progress=False, **arguments)
        zoo = Zoo.open(tmp_path / "good.h5")
        assert zoo.recipe["skipped"] == report.skipped > 0
        assert len(report.skipped_first) == min(report.skipped, 10)
        return report, next(iter(zoo.populations.values()))

    return one


def first(folder, pattern="**/*.pth"):
    return sorted(folder.glob(pattern))[0]


def without_options(text):
    return text.partition("; --skip-bad")[0]


# -- before the work ---------------------------------------------------------------------------------------


def test_unknown_formats_are_told_the_known_ones(refused, tmp_path):
    assert (
        refused("dws", tmp_path, ConfigError)
        == f"format: expected one of {', '.join(IMPORTERS)}, found 'dws'"
    )


@pytest.mark.parametrize("format", IMPORTERS)
def test_sources_that_are_missing_files_or_empty(refused, tmp_path, format):
    assert "nowhere: not found; expected a folder with" in refused(format, tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("x")
    assert "expected a folder with" in refused(format, tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    assert refused(format, tmp_path / "empty").startswith(f"source {tmp_path / 'empty'}: expected ")


def test_options(refused, dwsnets):
    assert refused("dwsnets", dwsnets.folder, ConfigError, options={"w1": 3}).startswith(
        "w1: unknown option of format dwsnets; expected one of fractions, seed,"
    )
    assert "w0: input should be greater than 0, found -1" in refused(
        "dwsnets", dwsnets.folder, ConfigError, options={"w0": -1}
    )
    assert "fractions: expected three shares that sum to 1" in refused(
        "dwsnets", dwsnets.folder, ConfigError, options={"fractions": [0.5, 0.1, 0.1]}
    )
    assert "expected one of sine, relu" in refused("dwsnets", dwsnets.folder, options={"activation": "mish"})


def test_outputs(tmp_path, dwsnets):
    import_zoo("dwsnets", dwsnets.folder, tmp_path / "z.h5", progress=False)
    with pytest.raises(OutputError, match=r"z\.h5 exists already"):
        import_zoo("dwsnets", dwsnets.folder, tmp_path / "z.h5", progress=False)
    with pytest.raises(OutputError, match="does not exist"):
        import_zoo("dwsnets", dwsnets.folder, tmp_path / "no" / "z.h5", progress=False)
    import_zoo("dwsnets", dwsnets.folder, tmp_path / "z.h5", overwrite=True, progress=False)


# -- files -------------------------------------------------------------------------------------------------


def damage(kind, path):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-400])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "NaN":
        state = torch.load(path)
        state["seq.1.weight"][2, 3] = float("nan")
        torch.save(state, path)
    elif kind == "wide":
        torch.save({"seq.0.weight": torch.randn(9, 2), "seq.0.bias": torch.randn(9)}, path)
    elif kind == "no dictionary":
        torch.save([torch.randn(2)], path)
    elif kind == "text inside":
        torch.save({**torch.load(path), "note": "hello"}, path)
    elif kind == "whole numbers":
        torch.save({name: tensor.long() for name, tensor in torch.load(path).items()}, path)


DAMAGES = {
    "truncated": "not a file that torch.save wrote, or damaged",
    "empty": "not a file that torch.save wrote, or damaged",
    "NaN": "weights that are NaN or infinite",
    "wide": "its tensors are seq.0.weight [9, 2], seq.0.bias [9], those of mnist_png_training_0_0",
    "no dictionary": "expected a state dict of tensors, found a list",
    "text inside": "expected a state dict of tensors, found an entry 'note'",
    "whole numbers": "no tensors",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_one_broken_file_is_named_or_counted(refused, skipped, dwsnets, kind):
    path = dwsnets.folder / "mnist_png_training_2_5" / "checkpoints" / "best_5.pth"
    damage(kind, path)
    message = refused("dwsnets", dwsnets.folder)
    assert message.startswith(f"{path}: {DAMAGES[kind]}")
    assert "--skip-bad leaves such files out" in message
    report, inr = skipped("dwsnets", dwsnets.folder)
    assert (report.networks, report.skipped) == (11, 1)
    assert report.skipped_first[0].startswith(
        f"mnist_png_training_2_5/checkpoints/best_5.pth: {DAMAGES[kind]}"
    )
    assert 5 not in inr.source
    assert np.isfinite(inr.weights).all()


def test_labels_stay_with_their_networks_when_some_are_left_out(tmp_path, skipped, dwsnets):
    import_zoo("dwsnets", dwsnets.folder, tmp_path / "all.h5", progress=False)
    whole = Zoo.open(tmp_path / "all.h5")["inr"]
    for number, kind in ((2, "truncated"), (4, "NaN"), (6, "wide")):
        damage(kind, next(dwsnets.folder.glob(f"mnist_png_training_*_{number}/checkpoints/*.pth")))
    report, inr = skipped("dwsnets", dwsnets.folder)
    kept = [at for at in range(12) if at not in (2, 4, 6)]
    assert report.skipped == 3
    assert np.array_equal(inr.weights, whole.weights[kept])
    for name in ("source", "view"):
        assert np.array_equal(getattr(inr, name), getattr(whole, name)[kept])
    assert np.array_equal(inr.labels["label"], whole.labels["label"][kept])


def test_when_all_are_bad(tmp_path, refused, dwsnets):
    for path in dwsnets.folder.rglob("*.pth"):
        path.write_text("x")
    assert "none of 12 checkpoints can be imported" in refused("dwsnets", dwsnets.folder, skip_bad=True)


def test_files_that_pickle_classes(refused, modelzoos):
    path = first(modelzoos.folder, "*/*/checkpoints")
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    message = refused("modelzoos", modelzoos.folder)
    assert message.startswith(f"{path}: it pickles objects of its own classes, and nothing is unpickled here")


def test_preprocessed_model_zoos_are_explained(refused, tmp_path):
    (tmp_path / "sets").mkdir()
    for source in (tmp_path / "sets" / "dataset_train.pt", tmp_path / "sets"):
        (tmp_path / "sets" / "dataset_train.pt").write_bytes(b"x")
        message = refused("modelzoos", source)
        assert "pickle" in message
        assert "nothing is unpickled here: that would run code" in message


def test_names_that_do_not_fit(refused, skipped, dwsnets):
    shutil.copy(first(dwsnets.folder), dwsnets.folder / "model.pth")
    assert "model.pth: expected a name as in NAME_{training|testing}" in refused("dwsnets", dwsnets.folder)
    assert skipped("dwsnets", dwsnets.folder)[0].networks == 12


def test_duplicate_items(refused, skipped, dwsnets, nfn):
    path = dwsnets.folder / "mnist_png_training_0_0" / "checkpoints" / "best_0.pth"
    shutil.copy(path, path.with_name("copy.pth"))
    message = refused("dwsnets", dwsnets.folder)
    assert "mnist_png_training_0_0/checkpoints/copy.pth: item 0, view 0 twice: it is" in message
    assert skipped("dwsnets", dwsnets.folder)[0].networks == 12
    shutil.copytree(nfn.folder / "mnist_0s", nfn.folder / "mnist_7s")
    assert "item 3, view 0 twice" in refused("nfn", nfn.folder)


def test_items_beyond_the_training_set(refused, dwsnets):
    message = refused("dwsnets", dwsnets.folder, options={"train_items": 5})
    assert "its item is beyond train_items, 5 (and 2 more such problems)" in message


def test_labels_inside_files(refused, augmentation):
    path = first(augmentation.folder)
    state = torch.load(path)
    torch.save({**state, "label": "three"}, path)
    assert "label: expected a whole number, found 'three'" in refused("augmentation", augmentation.folder)
    torch.save({name: tensor for name, tensor in state.items() if name != "label"}, path)
    assert "expected a dictionary with a 'label', found none" in refused("augmentation", augmentation.folder)


# -- splits files ------------------------------------------------------------------------------------------


def rewrite(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def add(document, split, path):
    document[split]["path"].append(path)
    document[split]["label"].append("0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: add(d, "train", "../../etc/passwd"), "leads out of the source"),
        (lambda d: d["train"]["label"].pop(), r"labels, one for each path"),
        (lambda d: d.update(holdout=[]), "expected one of train, val, test, found 'holdout'"),
        (lambda d: d.update(val=3), "val: expected a list of paths, or an object with one under 'path'"),
        (lambda d: add(d, "val", d["train"]["path"][0]), "is in train and in val"),
        (lambda d: d["train"]["label"].__setitem__(0, 9), "its label is 0, but 9 in mnist_splits.json"),
    ],
)  # fmt: skip
def test_splits_that_contradict(refused, dwsnets, dwsnets_splits, change, message):
    rewrite(dwsnets_splits, change)
    assert message in refused("dwsnets", dwsnets.folder, splits=dwsnets_splits)


def test_listed_paths_without_files_and_files_that_are_not_listed(refused, skipped, dwsnets, dwsnets_splits):
    def change(document):
        document["train"]["path"][0] = "mnist-inrs/mnist_png_training_0_77/checkpoints/x.pth"

    rewrite(dwsnets_splits, change)
    message = refused("dwsnets", dwsnets.folder, splits=dwsnets_splits)
    assert (
        "0_77/checkpoints/x.pth: listed in mnist_splits.json, but there is no such file (and 1 more"
        in message
    )
    report, _ = skipped("dwsnets", dwsnets.folder, splits=dwsnets_splits)
    assert (report.networks, report.skipped) == (11, 2)


def test_splits_files_that_are_none(refused, dwsnets, tmp_path):
    assert "cannot be read" in refused("dwsnets", dwsnets.folder, splits=tmp_path / "none.json")
    for text, expected in (("{", "not JSON"), ("[]", "expected a JSON object of train, val, test")):
        (tmp_path / "s.json").write_text(text)
        assert expected in refused("dwsnets", dwsnets.folder, splits=tmp_path / "s.json")


def test_views_of_one_item_in_two_splits(refused, augmentation, tmp_path):
    paths = sorted(str(path) for path in augmentation.folder.rglob("*.pth"))
    (tmp_path / "s.json").write_text(json.dumps({"train": paths[:3], "test": paths[3:]}))
    assert "of the same item 0, in train" in refused(
        "augmentation", augmentation.folder, splits=tmp_path / "s.json"
    )


def test_an_ambiguous_path(refused, augmentation, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"train": ["net.pth"]}))
    assert "'net.pth' may be one of 6 files" in refused(
        "augmentation", augmentation.folder, splits=tmp_path / "s.json"
    )


# -- arrays and tables -------------------------------------------------------------------------------------


def csv_of(folder):
    with gzip.open(folder / "metrics.csv.gz", "rt", newline="") as file:
        return list(csv.reader(file))


def write_csv(folder, rows):
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows(rows)


def test_arrays_that_are_damaged_or_of_objects(refused, small_cnn_zoo):
    path = small_cnn_zoo.folder / "weights.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert (
        refused("small-cnn-zoo", small_cnn_zoo.folder)
        == f"{path}: not a readable array (the file is truncated)"
    )
    path.write_bytes(b"\x93NUMPY")
    assert "not a readable array" in refused("small-cnn-zoo", small_cnn_zoo.folder)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "it pickles objects, and nothing is unpickled here" in refused(
        "small-cnn-zoo", small_cnn_zoo.folder
    )
    with path.open("wb") as file:
        np.savez(file, weights=np.zeros((2, 3), np.float32))
    assert "expected one array as np.save writes it, found an archive" in refused(
        "small-cnn-zoo", small_cnn_zoo.folder
    )
    np.save(path, np.zeros(3, dtype=np.int64))
    assert "expected floats of shape (rows, parameters), found int64 [3]" in refused(
        "small-cnn-zoo", small_cnn_zoo.folder
    )


def test_tables_that_do_not_fit_the_array(refused, small_cnn_zoo):
    rows = csv_of(small_cnn_zoo.folder)
    write_csv(small_cnn_zoo.folder, rows[:-1])
    assert "metrics.csv.gz: has 5 rows, but weights.npy 6" in refused("small-cnn-zoo", small_cnn_zoo.folder)
    write_csv(small_cnn_zoo.folder, [*rows[:3], rows[3][:-2], *rows[4:]])
    assert "metrics.csv.gz, line 4: expected 11 values, found 9" in refused(
        "small-cnn-zoo", small_cnn_zoo.folder
    )
    write_csv(small_cnn_zoo.folder, [rows[0], *rows[1:-1], rows[-2]])
    assert "weights.npy row 5: network /cns/x/2, step 0 twice" in refused(
        "small-cnn-zoo", small_cnn_zoo.folder
    )
    write_csv(small_cnn_zoo.folder, [[*rows[0][:1], "dir", *rows[0][2:]], *rows[1:]])
    assert "expected a column modeldir" in refused("small-cnn-zoo", small_cnn_zoo.folder)
    (small_cnn_zoo.folder / "metrics.csv.gz").write_bytes(b"no gzip")
    assert "metrics.csv.gz: cannot be read" in refused("small-cnn-zoo", small_cnn_zoo.folder)
    (small_cnn_zoo.folder / "metrics.csv.gz").unlink()
    assert "found no metrics.csv" in refused("small-cnn-zoo", small_cnn_zoo.folder)


def test_layouts_that_do_not_fit_the_array(refused, small_cnn_zoo):
    path = small_cnn_zoo.folder / "layout.csv"
    lines = path.read_text().splitlines()
    for changed, message in (
        (lines[:-1], "its variables have 4,810 numbers, but rows of weights.npy 4,970"),
        ([lines[0], *lines[2:]], "sequential/conv2d/kernel:0: expected to start at 0, found 16"),
        ([*lines[:2], lines[2].replace("3, 1, 16)", "3, 2, 16)"), *lines[3:]], "line 3: sequential/conv2d/kernel:0: "),
        ([*lines[:2], lines[2].replace("(3, 3, 1, 16)", "__import__('os')"), *lines[3:]], "expected numbers and a shape"),
        ([lines[0].replace("shape", "form"), *lines[1:]], "expected a column shape"),
    ):  # fmt: skip
        path.write_text("\n".join(changed))
        assert message in refused("small-cnn-zoo", small_cnn_zoo.folder)


def test_unknown_and_missing_activations(refused, small_cnn_zoo):
    rows = csv_of(small_cnn_zoo.folder)
    write_csv(small_cnn_zoo.folder, [[cell.replace("tanh", "mish") for cell in row] for row in rows])
    assert "config.activation: no activation 'mish' is known" in refused(
        "small-cnn-zoo", small_cnn_zoo.folder
    )
    write_csv(small_cnn_zoo.folder, [row[:3] + row[4:] for row in rows])
    assert "say --set activation=NAME" in refused("small-cnn-zoo", small_cnn_zoo.folder)


def test_nan_rows_of_the_array(refused, skipped, small_cnn_zoo):
    path = small_cnn_zoo.folder / "weights.npy"
    weights = np.load(path)
    weights[1, 7] = np.inf
    np.save(path, weights)
    assert "weights.npy row 1: weights that are NaN or infinite" in refused(
        "small-cnn-zoo", small_cnn_zoo.folder
    )
    report, relu = skipped("small-cnn-zoo", small_cnn_zoo.folder)
    assert (report.rows, relu.step.tolist()) == (5, [0, 0, 10])


def test_rows_without_weights_and_weights_without_rows(refused, skipped, folder, cnn_wild_park):
    (folder.folder / "net1.pth").rename(folder.folder / "other.pth")
    message = refused("folder", folder.folder)
    assert "net1.pth: listed in table.csv, but there is no such file (and 1 more such problems)" in message
    report, _ = skipped("folder", folder.folder)
    assert (report.networks, report.skipped) == (3, 2)
    assert report.skipped_first[1] == "other.pth: not listed in table.csv"
    rewrite(cnn_wild_park.folder / "scores.json", lambda rows: rows.pop(1))
    assert "checkpoint_000012/checkpoint.pt: not listed in scores.json" in refused(
        "cnn-wild-park", cnn_wild_park.folder
    )


def test_paths_in_tables_that_leave_the_source(refused, folder, cnn_wild_park):
    table = folder.folder / "table.csv"
    table.write_text(table.read_text().replace("net1.pth", "a/../../net1.pth"))
    assert "table.csv: 'a/../../net1.pth' leads out of the source folder" in refused("folder", folder.folder)
    rewrite(cnn_wild_park.folder / "scores.json", lambda rows: rows[0].update(path="../x/checkpoint.pt"))
    assert "leads out of the source folder" in refused("cnn-wild-park", cnn_wild_park.folder)


def test_tables_of_a_folder(refused, folder):
    table = folder.folder / "table.csv"
    good = table.read_text()
    for text, message in (
        (good.replace("path", "weights", 1), "expected a column path or file or filename or name"),
        (good.replace("lr", "label", 1), "expected a first line of different names, found 'label' twice"),
        (good.replace("valid", "holdout"), "split: expected one of train, val, test, found 'holdout'"),
        (good.replace("net1.pth", "net0.pt"), "net0.pt: listed twice in table.csv"),
        (good.replace("colour", "step"), "step: expected whole numbers"),
        ("", "found an empty file"),
    ):
        table.write_text(text)
        assert message in refused("folder", folder.folder)
    (folder.folder / "more.json").write_text("[]")
    assert "expected one CSV or JSON, found more.json, table.csv; say --set table=FILE" in refused(
        "folder", folder.folder
    )
    assert "table: found no x.csv" in refused("folder", folder.folder, options={"table": "x.csv"})


def test_configurations_of_wild_networks(refused, cnn_wild_park):
    path = first(cnn_wild_park.folder, "trial_0*/*/checkpoint.pt")
    state = torch.load(path)
    for change, message in (
        ({"residual": [-1, 1, 0]}, "residual: expected an earlier layer or -1 for layer 1, found 1"),
        ({"residual": [-1]}, "residual: expected 3 entries, one for each layer, found 1"),
        ({"activation": "mish"}, "activation: expected one that is known, found 'mish'"),
        ({"stride": 0}, "its shapes make no network (stride"),
    ):
        torch.save({"model": state["model"], "config": {**state["config"], **change}}, path)
        assert f"{path}: " in refused("cnn-wild-park", cnn_wild_park.folder)
        assert message in refused("cnn-wild-park", cnn_wild_park.folder)
    torch.save(state["model"], path)
    assert "expected a dictionary of 'model' and 'config'" in refused("cnn-wild-park", cnn_wild_park.folder)


def test_model_zoos_without_parts(refused, skipped, modelzoos):
    network = first(modelzoos.folder, "NN*")
    (network / "result.json").write_text('{"training_iteration": 1}\n{"broken\n')
    assert "result.json, line 2: expected a JSON object with training_iteration" in refused(
        "modelzoos", modelzoos.folder
    )
    (network / "result.json").unlink()
    (network / "params.json").unlink()
    assert "no params.json in the folder of its network" in refused("modelzoos", modelzoos.folder)
    report, cnn = skipped("modelzoos", modelzoos.folder)
    assert (report.skipped, cnn.networks, cnn.rows) == (3, 1, 3)


# -- the disk ----------------------------------------------------------------------------------------------


def test_a_full_disk_while_reading_and_while_writing(tmp_path, refused, dwsnets, monkeypatch):
    from weightspace.zoo import _row_store

    write_at = _row_store._write_at

    def full(path, offset, content):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(_row_store, "_write_at", full)
    assert "bad.h5.parts could not be written (No space left on device)" in refused(
        "dwsnets", dwsnets.folder, OutputError
    )
    monkeypatch.setattr(_row_store, "_write_at", write_at)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: full(0, 0, 0))
        assert "could not be written (No space left on device)" in refused(
            "dwsnets", dwsnets.folder, OutputError
        )
    report = import_zoo("dwsnets", dwsnets.folder, tmp_path / "bad.h5", progress=False)
    assert (report.read, report.networks) == (0, 12), "the rows waited"
