"""Rows that wait until a zoo is complete: what a kill leaves, what belongs to other work, what becomes of them."""

import json
import resource
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightspace.errors import OutputError
from weightspace.testing import tiny_zoo
from weightspace.zoo import RowStore, Zoo, hold_lock

WORK = {"command": "copy", "seed": 1}
ZOO = tiny_zoo(networks=6)
ROWS = np.asarray(ZOO["inr"].weights)


def zoo_of(rows):
    return Zoo({"inr": replace(ZOO["inr"], weights=rows["inr"])}, recipe={"name": "copy"})


def test_rows_and_notes_are_there_when_the_work_goes_on(tmp_path):
    output = tmp_path / "zoo.h5"
    with RowStore(output, WORK) as store:
        store.append({"inr": ROWS[:2]}, [{"a": 1}, {"bad": "x"}])
        store.append({"inr": ROWS[2:3]})
    with RowStore(output, WORK) as store:
        assert (store.done, store.notes) == (3, [{"a": 1}, {"bad": "x"}])
        store.append({"inr": ROWS[3:]}, ["last"])
        digest = store.finish(zoo_of)
    assert digest == zoo_of({"inr": ROWS}).digest == Zoo.open(output).digest
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.h5"]


def test_rows_without_a_name_are_of_one_population(tmp_path):
    with RowStore(tmp_path / "zoo.h5", WORK) as store:
        store.append(ROWS[:4])
        store.append(ROWS[4:])
        store.finish(lambda rows: zoo_of({"inr": rows["networks"]}))
    assert np.array_equal(Zoo.open(tmp_path / "zoo.h5")["inr"].weights, ROWS)


def test_several_populations_of_different_types_and_sizes(tmp_path):
    wide, half = np.arange(12.0, dtype=np.float32).reshape(2, 6), np.ones((3, 2), dtype=np.float16)
    with RowStore(tmp_path / "zoo.h5", WORK) as store:
        store.append({"a/b": wide, "c": half[:1]})
    with RowStore(tmp_path / "zoo.h5", WORK) as store:
        store.append({"c": half[1:]})
        kept = {}
        with pytest.raises(ZeroDivisionError):
            store.finish(lambda rows: kept.update({k: np.array(v) for k, v in rows.items()}) or 1 / 0)
    assert np.array_equal(kept["a/b"], wide)
    assert (kept["c"].dtype, kept["c"].shape) == (np.float16, (3, 2))


@pytest.mark.parametrize("lost", [1, 100, 3000])
def test_a_block_that_was_cut_off_is_forgotten(tmp_path, lost):
    """A power cut may lose the end of either file."""
    with RowStore(tmp_path / "zoo.h5", WORK) as store:
        store.append({"inr": ROWS[:2]}, ["first"])
        store.append({"inr": ROWS[2:]}, ["second"])
    folder = tmp_path / "zoo.h5.parts"
    content = (folder / "rows-inr").read_bytes()
    (folder / "rows-inr").write_bytes(content[: max(len(content) - lost, ROWS[:2].nbytes)])
    with RowStore(tmp_path / "zoo.h5", WORK) as store:
        assert (store.done, store.notes) == (2, ["first"])
        store.append({"inr": ROWS[2:]}, ["again"])
        store.finish(zoo_of)
    assert np.array_equal(Zoo.open(tmp_path / "zoo.h5")["inr"].weights, ROWS)


@given(st.data())
def test_any_damage_to_the_files_leaves_a_whole_beginning(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("store")
    with RowStore(folder / "zoo.h5", WORK) as store:
        for row in range(4):
            store.append({"inr": ROWS[row : row + 1]}, [row])
    victim = folder / "zoo.h5.parts" / data.draw(st.sampled_from(["log.jsonl", "rows-inr"]))
    content = bytearray(victim.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 0x20
    else:
        del content[at:]
    victim.write_bytes(content)
    with RowStore(folder / "zoo.h5", WORK) as store:
        assert store.notes == list(range(store.done))
        for row in range(store.done, 6):
            store.append({"inr": ROWS[row : row + 1]}, [row])
        store.finish(zoo_of)
    assert np.array_equal(Zoo.open(folder / "zoo.h5")["inr"].weights, ROWS)


def test_what_a_failed_append_left_is_overwritten(tmp_path, monkeypatch):
    from weightspace.zoo import _row_store

    write_at = _row_store._write_at

    def full(path, offset, content):
        write_at(path, offset, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with RowStore(tmp_path / "zoo.h5", WORK) as store:
        store.append({"inr": ROWS[:2]})
        monkeypatch.setattr(_row_store, "_write_at", full)
        with pytest.raises(
            OutputError, match=r"zoo\.h5\.parts could not be written \(No space left on device\)"
        ):
            store.append({"inr": ROWS[2:4]})
        monkeypatch.setattr(_row_store, "_write_at", write_at)
        store.append({"inr": ROWS[2:]})
        store.finish(zoo_of)
    assert np.array_equal(Zoo.open(tmp_path / "zoo.h5")["inr"].weights, ROWS)


def test_rows_of_other_work_are_refused_and_thrown_away_on_request(tmp_path):
    output, other = tmp_path / "zoo.h5", {**WORK, "seed": 2}
    with RowStore(output, WORK) as store:
        store.append({"inr": ROWS})
    with pytest.raises(
        OutputError, match=r"holds the beginning of other work \(seed: 1 there, 2 now\); choose"
    ):
        RowStore(output, other)
    with RowStore(output, other, overwrite=True) as store:
        assert store.done == 0
    assert json.loads((tmp_path / "zoo.h5.parts" / "work.json").read_text()) == other


def test_overwrite_goes_on_with_the_same_work(tmp_path):
    ZOO.save(tmp_path / "zoo.h5")
    for done in (0, 2):
        with RowStore(tmp_path / "zoo.h5", WORK, overwrite=True) as store:
            assert store.done == done
            store.append({"inr": ROWS[:2]})


def test_outputs_and_folders_of_strangers_are_refused(tmp_path):
    with pytest.raises(OutputError, match=r"directory .*nowhere does not exist"):
        RowStore(tmp_path / "nowhere" / "zoo.h5", WORK)
    (tmp_path / "zoo.h5.parts").mkdir()
    (tmp_path / "zoo.h5.parts" / "diary.txt").write_text("dear")
    with pytest.raises(
        OutputError, match=r"is no folder of unfinished rows \(it has no work\.json\); move it away"
    ):
        RowStore(tmp_path / "zoo.h5", WORK, overwrite=True)
    ZOO.save(tmp_path / "done.h5")
    with pytest.raises(OutputError, match=r"done\.h5 exists already"):
        RowStore(tmp_path / "done.h5", WORK)


def test_a_damaged_record_is_other_work(tmp_path):
    with RowStore(tmp_path / "zoo.h5", WORK):
        pass
    (tmp_path / "zoo.h5.parts" / "work.json").write_text("{")
    with pytest.raises(OutputError, match=r"its work\.json is damaged"):
        RowStore(tmp_path / "zoo.h5", WORK)


def test_two_at_once_are_refused_and_a_killed_writer_is_not_waited_for(tmp_path):
    with RowStore(tmp_path / "zoo.h5", WORK) as store:
        store.append({"inr": ROWS[:1]})
        with (
            pytest.raises(OutputError, match="is being written by process"),
            RowStore(tmp_path / "zoo.h5", WORK),
        ):
            pass
    (tmp_path / "zoo.h5.parts" / "lock").write_text("process 1 on nowhere")
    (tmp_path / ".zoo.h5.77-abcdef12.tmp").write_text("half a zoo")
    with RowStore(tmp_path / "zoo.h5", WORK) as store:
        assert store.done == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_lock_that_cannot_be_signed_is_held_all_the_same(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # files may not grow, as on a full disk
    try:
        with (
            hold_lock(tmp_path / "lock", "me", shared=False),
            pytest.raises(OutputError, match="is being written by another process"),
            hold_lock(tmp_path / "lock", "you", shared=False),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
