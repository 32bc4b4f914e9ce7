"""Reading state dicts: what torch would load, faster, and nothing that runs code."""

import pickle
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from weightspace.errors import DataError
from weightspace.zoo.transfer import _state_files
from weightspace.zoo.transfer._state_files import StateReader, read_tensors

shared = torch.arange(12.0)


class Evil:
    """Whoever unpickles it learns so."""

    def __reduce__(self):
        return print, ("unpickled",)


CASES = {
    "a state dict": lambda k: OrderedDict(w=torch.randn(3, 4), b=torch.full((3,), float(k))),
    "nested": lambda k: {"model": {"w": torch.randn(2, 2)}, "epoch": 7, "tags": ["x", (1, None, True)]},
    "parameters": lambda k: {"w": nn.Parameter(torch.randn(5))},
    "other types": lambda k: {
        "d": torch.randn(3).double(),
        "i": torch.arange(k, k + 3),
        "f": torch.randn(4).half(),
    },
    "a transposed tensor": lambda k: {"w": torch.randn(3, 4).t()},
    "shared memory": lambda k: {"a": (shared + k)[2:5], "b": shared[:4] * k},
    "one storage, two tensors": lambda k: dict(zip("ab", (shared + k).split(6), strict=True)),
    "empty": lambda k: {"w": torch.zeros(0, 3), "v": torch.randn(2)},
    "a scalar": lambda k: {"w": torch.tensor(float(k)), "v": torch.randn(2)},
    "a tensor alone": lambda k: torch.randn(3),
}


def assert_equal(found, expected):
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    else:
        assert found == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zipped", [True, False])
def test_it_reads_what_torch_reads(tmp_path, case, zipped):
    reader = StateReader()
    for k in range(4):
        path = tmp_path / f"{'long' * k}{k}.pth"
        torch.save(CASES[case](k), path, _use_new_zipfile_serialization=zipped)
        assert_equal(reader.read(path), torch.load(path, weights_only=True))


def test_values_in_the_pickle_are_not_mixed_up(tmp_path):
    reader = StateReader()
    for k in range(200):
        torch.save({"w": torch.full((2,), float(k)), "label": k % 100}, tmp_path / "x.pth")
        found = reader.read(tmp_path / "x.pth")
        assert (found["label"], found["w"].tolist()) == (k % 100, [k, k])
    assert len(reader._plans) <= _state_files._KEPT


def test_pickles_of_one_shape_go_to_torch_once(tmp_path, monkeypatch):
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(1) or load(*a, **k))
    reader = StateReader()
    for k in range(20):
        torch.save({"w": torch.randn(3, 3), "b": torch.randn(3)}, tmp_path / f"{k}.pth")
        reader.read(tmp_path / f"{k}.pth")
    assert len(loads) == 1


def test_it_is_faster_than_torch(tmp_path):
    net = nn.Sequential(nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 1))
    paths = [tmp_path / f"{k}.pth" for k in range(60)]
    for path in paths:
        torch.save(net.state_dict(), path)

    def seconds(read):
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            for path in paths:
                read(path)
            times.append(time.perf_counter() - begun)
        return min(times)

    assert seconds(StateReader().read) < 0.7 * seconds(lambda path: torch.load(path, weights_only=True))


@pytest.mark.parametrize("first", [True, False])
def test_nothing_is_unpickled(tmp_path, capfd, first):
    reader = StateReader()
    if not first:
        torch.save({"w": torch.randn(2)}, tmp_path / "good.pth")
        reader.read(tmp_path / "good.pth")
    torch.save({"w": torch.randn(2), "evil": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="pickles objects of its own classes, and nothing is unpickled here"):
        reader.read(tmp_path / "evil.pth")
    with pytest.raises(DataError):
        reader.read(tmp_path / "raw.pth")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    reader = StateReader()
    for name in ("good.pth", "cut.pth"):
        torch.save({"w": torch.randn(40, 40), "b": torch.randn(40)}, tmp_path / name)
    reader.read(tmp_path / "good.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"not a file that torch.save wrote, or damaged"):
        reader.read(tmp_path / "cut.pth")


def test_flipped_bits_are_not_imported_silently(tmp_path):
    """Where the checksum does not hold, torch decides, as it would without us."""
    reader = StateReader()
    torch.save({"w": torch.randn(40, 40)}, tmp_path / "x.pth")
    good = reader.read(tmp_path / "x.pth")["w"].clone()
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        name = next(each.filename for each in archive.infolist() if "data/0" in each.filename)
        payload = archive.read(name)
    content = bytearray((tmp_path / "x.pth").read_bytes())
    content[content.index(payload) + 5] ^= 1
    (tmp_path / "x.pth").write_bytes(content)
    try:
        expected = torch.load(tmp_path / "x.pth", weights_only=True)["w"]
    except RuntimeError:
        with pytest.raises(DataError):
            reader.read(tmp_path / "x.pth")
    else:
        assert torch.equal(reader.read(tmp_path / "x.pth")["w"], expected)
        assert not torch.equal(expected, good)


def test_missing_files_and_other_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        StateReader().read(tmp_path / "none.pth")
    (tmp_path / "x.pth").write_text("hello")
    with pytest.raises(DataError, match=r"not a file that torch.save wrote"):
        StateReader().read(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(b"\x08")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        read_tensors(tmp_path / "x.safetensors")
