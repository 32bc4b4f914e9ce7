"""Sources that are odd or made to do harm: refused in a sentence, at once, and never half understood."""

import gzip
import io
import json
import os
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from weightspace.errors import ConfigError, DataError, OutputError
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo, export_zoo, import_zoo
from weightspace.zoo.transfer import _importer
from weightspace.zoo.transfer._state_files import StateReader


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for at, name in enumerate("abc"):
        torch.save({"w": torch.full((3,), float(at))}, folder / f"{name}.pt")
    return folder


@pytest.fixture
def imported(tmp_path, source):
    def run(format="folder", **arguments):
        report = import_zoo(format, source, tmp_path / "zoo.h5", progress=False, **arguments)
        return Zoo.open(tmp_path / "zoo.h5")[next(iter(report.populations))]

    return run


def itself():
    value = {"w": torch.ones(2)}
    value["model"] = value
    return value


ODD = {
    "names that are numbers": (
        lambda: {0: torch.ones(3)},
        "expected a state dict of tensors, found an entry '0'",
    ),
    "no numbers": (
        lambda: {"w": torch.ones(3, device="meta")},
        "w: expected a tensor whose numbers are all in",
    ),
    "sparse": (
        lambda: {"w": torch.eye(3).to_sparse()},
        "w: expected a tensor whose numbers are all in the file",
    ),
    "one number, a million times a million": (
        lambda: {"w": torch.ones(1).expand(10**6, 10**6)},
        "w: expected a tensor whose numbers are all in the file",
    ),
    "complex": (lambda: {"w": torch.ones(3, dtype=torch.complex64)}, "w: expected numbers with a point"),
    "complex beside others": (
        lambda: {"v": torch.ones(3), "w": torch.ones(3, dtype=torch.complex64)},
        "w: expected numbers with a point",
    ),
    "whole numbers alone": (lambda: {"w": torch.arange(3)}, "no tensors of numbers with a point"),
    "an axis of size 0": (lambda: {"w": torch.ones(0, 3)}, "tensor 'w': a cell reaches beyond"),
    "a dictionary that holds itself": (itself, "expected a state dict of tensors, found an entry 'model'"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files_are_refused_or_left_out(imported, source, case):
    make, message = ODD[case]
    torch.save(make(), source / "0.pt")
    with pytest.raises(DataError, match=f"0.pt: {message}"):
        imported()
    assert len(imported(skip_bad=True, overwrite=True).weights) == 3


def test_a_tensor_with_a_negative_bit_is_what_torch_reads(tmp_path):
    torch.save({"w": torch._neg_view(torch.arange(1.0, 4.0))}, tmp_path / "x.pt")
    for _ in range(2):
        assert StateReader().read(tmp_path / "x.pt")["w"].tolist() == [-1.0, -2.0, -3.0]


def test_a_small_pickle_of_a_huge_object_takes_no_time(tmp_path):
    """A list of two lists, which are one, which holds two lists, ...: 2^200 entries in a few hundred bytes."""
    value = [1]
    for _ in range(200):
        value = [value, value]
    itself = []
    itself.append(itself)
    torch.save({"state_dict": {"w": torch.ones(2)}, "more": value, "endless": itself}, tmp_path / "x.pt")
    begun = time.perf_counter()
    assert StateReader().read(tmp_path / "x.pt")["state_dict"]["w"].tolist() == [1.0, 1.0]
    assert time.perf_counter() - begun < 5


def rewritten(path, order="little", method=zipfile.ZIP_STORED, change=lambda payload: payload):
    """A file of ``torch.save`` with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", method) as archive:
        for name, payload in records.items():
            payload = order.encode() if name.endswith("byteorder") else payload
            archive.writestr(name, change(payload) if "/data/" in name else payload)
    path.write_bytes(written.getvalue())


def test_bytes_in_the_other_order(tmp_path):
    reader = StateReader()
    for name in ("little", "big", "again"):
        torch.save({"w": torch.arange(5.0)}, tmp_path / name)
        if name == "big":
            rewritten(
                tmp_path / name, "big", change=lambda p: np.frombuffer(p, "<f4").astype(">f4").tobytes()
            )
        assert reader.read(tmp_path / name)["w"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_compressed_files_are_refused_before_they_fill_the_memory(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", method=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"it is compressed, which torch.save never does"):
        StateReader().read(tmp_path / "x.pt")


def test_pipes_are_no_files(imported, source):
    os.mkfifo(source / "pipe.pt")
    assert len(imported().weights) == 3
    (source / "gone.pt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone.pt: cannot be read \(No such file"):
        import_zoo("folder", source, source.parent / "other.h5", progress=False)


# -- tables ------------------------------------------------------------------------------------------------


def test_tables_as_spreadsheets_write_them(imported, source):
    (source / "t.csv").write_bytes('\ufeffpath,label\r\n"a.pt",4\r\nb.pt,"5"\r\nc.pt,\r\n'.encode())
    label = imported().labels["label"]
    assert label.dtype == np.float32  # one is missing
    assert label[:2].tolist() == [4.0, 5.0]
    assert np.isnan(label[2])


def test_names_with_underscores_are_no_numbers(imported, source):
    (source / "t.csv").write_text("path,run\na.pt,1_0\nb.pt,10\nc.pt,3_1\n")
    population = imported()
    names = population.protocol["choices"]["run"]
    assert [names[code] for code in population.labels["run"]] == ["1_0", "10", "3_1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b"[" * 100_000, "t.json: not JSON"),
        (
            "t.csv.gz",
            gzip.compress(b"path\n" + b"a.pt\n" * 50, mtime=0)[:14] + b"\xff" * 30,
            "t.csv.gz: damaged, or no CSV",
        ),
        (
            "t.csv",
            b"path,population\na.pt,x/y\nb.pt,x/y\nc.pt,z\n",
            "population: expected a name .* found 'x/y'",
        ),
        (
            "t.csv",
            b"path,val/acc,val_acc\na.pt,.1,.2\nb.pt,.1,.2\nc.pt,.1,.2\n",
            "'val_acc' and another column",
        ),
        (
            "t.csv",
            b"path,network,step,split\na.pt,0,0,train\nb.pt,0,1,test\nc.pt,1,0,test\n",
            'b.pt is in test, but a.pt, of the same network "0", in train',
        ),
    ],
)
def test_odd_tables(imported, source, name, content, message):
    (source / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        imported()


def test_numbers_beyond_all_bounds_are_left_out(imported, source):
    rows = [{"path": f"{name}.pt", "x": 10**400, "y": 1} for name in "abc"]
    (source / "t.json").write_text(json.dumps(rows))
    assert list(imported().labels) == ["x", "y"]


def test_a_split_under_two_names(imported, tmp_path):
    (tmp_path / "splits.json").write_text('{"train": ["a.pt", "b.pt", "c.pt"], "training": ["c.pt"]}')
    with pytest.raises(DataError, match="expected each split once, found train, training"):
        imported(splits=tmp_path / "splits.json")


# -- the array of the Small CNN Zoo ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["d/kernel:0,0,8,'(4,2)'", "d/bias:0,8,10,'(2,)'"], "expected convolutions and one dense layer"),
        (["d/kernel:0,inf,8,'(4,2)'"], "line 2: d/kernel:0: expected numbers and a shape"),
        (
            ["c/kernel:0,0,4,'(1,1,1,4)'", "c/bias:0,4,8,'(4,)'", "n/gamma:0,8,12,'(4,)'", "d/kernel:0,12,20,'(4,2)'",
             "d/bias:0,20,22,'(2,)'"],
            "n/gamma:0: expected kernels, and a bias in the scope of each",
        ),
    ],
)  # fmt: skip
def test_layouts_with_other_layers(tmp_path, source, rows, message):
    text = "\n".join(["varname,start_idx,end_idx,shape", *rows]).replace("'", '"')
    (source / "layout.csv").write_text(text)
    parameters = 22 if len(rows) == 5 else 10
    np.save(source / "weights.npy", np.ones((1, parameters), dtype=np.float32))
    (source / "metrics.csv").write_text("modeldir,config.activation\nm,relu\n")
    with pytest.raises(DataError, match=message):
        import_zoo("small-cnn-zoo", source, tmp_path / "zoo.h5", progress=False)


@pytest.mark.parametrize("shape", [(2**70, 50), (-3, 50)])
def test_headers_that_promise_too_much(tmp_path, source, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    (source / "weights.npy").write_bytes(
        b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + b"0" * 99
    )
    (source / "layout.csv").write_text("")
    with pytest.raises(DataError, match=r"weights.npy: not a readable array"):
        import_zoo("small-cnn-zoo", source, tmp_path / "zoo.h5", progress=False)


# -- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["other files", "another folder"])
def test_what_was_read_of_other_files_does_not_count(tmp_path, imported, source, monkeypatch, change):
    whole = _importer.FileImporter.blocks

    def killed(self, listing, start):
        yield next(whole(self, listing, start))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_importer, "BLOCK_FILES", 1)
        patch.setattr(_importer.FileImporter, "blocks", killed)
        with pytest.raises(KeyboardInterrupt):
            imported()
    if change == "other files":
        torch.save({"w": torch.full((4,), 9.0)}, source / "a.pt")
    else:
        source.rename(tmp_path / "moved")
        source.symlink_to("moved")
    expected = {
        "other files": (DataError, "a.pt: has changed since it was read; --overwrite begins anew"),
        "another folder": (OutputError, "holds the beginning of other work .source: "),
    }
    error, message = expected[change]
    with pytest.raises(error, match=message):
        imported()
    assert len(imported(overwrite=True, skip_bad=True).weights) == (1 if change == "other files" else 3)


# -- exports that would overwrite --------------------------------------------------------------------------


def labelled(**columns):
    population = tiny_zoo(networks=4)["inr"]
    return Zoo({"inr": replace(population, labels={"label": np.zeros(4, dtype=np.int64)}, **columns)})


def test_items_of_one_remainder_are_different_items(tmp_path):
    zoo = labelled(source=np.array([60_005, 120_005, 5, 6]), view=np.zeros(4, dtype=np.int64))
    export_zoo(zoo, "dwsnets", tmp_path / "out", progress=False)
    import_zoo("dwsnets", tmp_path / "out", tmp_path / "again.h5", progress=False)
    again = Zoo.open(tmp_path / "again.h5")["inr"]
    assert again.source.tolist() == [5, 6, 60_005, 120_005]
    assert np.array_equal(again.weights, zoo["inr"].weights[[2, 3, 0, 1]])


@pytest.mark.parametrize("format", ["nfn", "augmentation"])
def test_two_networks_of_one_view(tmp_path, format):
    zoo = labelled(source=np.array([5, 5, 1, 2]), view=np.zeros(4, dtype=np.int64))
    with pytest.raises(ConfigError, match="one network per item and view"):
        export_zoo(zoo, format, tmp_path / "out", progress=False)


def test_two_checkpoints_of_one_step(tmp_path):
    network = np.array([0, 0, 1, 2])
    zoo = labelled(network=network)
    with pytest.raises(
        ConfigError, match="one checkpoint per network and step, and population inr has several"
    ):
        export_zoo(zoo, "modelzoos", tmp_path / "out", progress=False)


@pytest.mark.parametrize("name", ["../evil", "..", ""])
@pytest.mark.parametrize("format", ["folder", "modelzoos"])
def test_populations_whose_names_lead_elsewhere(tmp_path, name, format):
    with pytest.raises(ConfigError, match="a population whose name can be that of a folder"):
        export_zoo(Zoo({name: labelled()["inr"]}), format, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_file_of_the_same_name_is_no_export(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "zoo.json").write_text('{"animals": 3}')
    with pytest.raises(OutputError, match="was not made by an export"):
        export_zoo(labelled(), "folder", tmp_path / "thesis", overwrite=True, progress=False)
    assert (tmp_path / "thesis" / "zoo.json").exists()
