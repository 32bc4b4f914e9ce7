"""The folder of shards: locks between real processes, states that are damaged, records, and what is left behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

from weightspace.datagen import _generate, _shards, generate, join_shards, load_recipe
from weightspace.datagen._shards import Part, ShardFolder, ShardState
from weightspace.errors import ConfigError, DataError, OutputError
from weightspace.zoo import Zoo, _locks, verify_digest

SMALL = {"source.size": 8, "network.hidden": [8], "protocol.steps": 20, "shard": 3}
PLAN = {"recipe": {"name": "a", "seed": 0}, "shard": 3, "device": "cpu", "data": "x"}


def make(output, *, count=8, changes=None, **options):
    settings = {"views": 1, "seed": 0, "progress": False, **options}
    return generate("digits-inr", output, count=count, overrides={**SMALL, **(changes or {})}, **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The digest of 8 networks in three shards that nothing interrupted."""
    return make(tmp_path_factory.mktemp("undisturbed") / "zoo.h5").digest


# -- locks -------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from weightspace.datagen._shards import Part, ShardFolder
with ShardFolder(Path(sys.argv[1])).locked(Part.parse(sys.argv[2]) if len(sys.argv) > 2 else None):
    print("held", flush=True)
    time.sleep(120)
"""


@contextlib.contextmanager
def holder(output, *part):
    """Another process that holds the lock; leaving the block kills it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output), *part], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_the_second_of_two_writers_ends_with_one_sentence(tmp_path, undisturbed):
    output = tmp_path / "zoo.h5"
    command = [sys.executable, "-c", "from weightspace.cli import main; main()"]
    arguments = ["generate", "digits-inr", "-o", str(output), "--count", "8", "--seed", "0", "--quiet"]
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    with holder(output) as other:
        result = subprocess.run(
            [*command, *arguments, *settings], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert re.fullmatch(
            rf"weightspace: output: .*zoo\.h5\.parts is being written by process {other.pid} on \S+; "
            "wait for it, or choose another name\n",
            result.stderr,
        )
        with pytest.raises(OutputError, match=f"is being written by process {other.pid} on"):
            make(output, shards="1/2")
        assert not output.exists()
    # it was killed, and could not tidy up: its name is still in the file
    assert f"process {other.pid}" in (tmp_path / "zoo.h5.parts" / "lock").read_text()
    assert make(output).digest == undisturbed
    assert list(tmp_path.iterdir()) == [output]


def test_parts_exclude_themselves_and_the_whole_but_not_each_other(tmp_path, undisturbed):
    output = tmp_path / "zoo.h5"
    with holder(output, "1/3") as other:
        name = rf"is being written by process {other.pid} on \S+ \(--shards 1/3\)"
        with pytest.raises(OutputError, match=name):
            make(output)
        with pytest.raises(OutputError, match=name):
            make(output, shards="1/3")
        with pytest.raises(OutputError, match=rf"{name}; use the same number of parts, or wait for it"):
            make(output, shards="2/2")
        report = make(output, shards="2/3")
        assert (report.shards_done, report.shards, report.joined) == (1, 3, False)
        with pytest.raises(OutputError, match=name):
            join_shards(output)
    assert make(output, shards="2/2").trained == 0
    assert make(output).digest == undisturbed


def test_a_lock_is_free_after_an_error(tmp_path):
    folder = ShardFolder(tmp_path / "zoo.h5")
    with pytest.raises(ZeroDivisionError), folder.locked():
        raise ZeroDivisionError
    with folder.locked():
        assert (folder.path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    assert (folder.path / "lock").read_text() == ""


def test_a_lock_whose_folder_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it the holder before us finishes and removes the folder."""
    folder = ShardFolder(tmp_path / "zoo.h5")
    opened, removals = _locks._opened, []

    def opened_then_removed(path):
        file = opened(path)
        if not removals:
            removals.append(path)
            shutil.rmtree(folder.path)
        return file

    monkeypatch.setattr(_locks, "_opened", opened_then_removed)
    with folder.locked():
        assert removals
        with pytest.raises(OutputError, match="is being written by"), ShardFolder(folder.output).locked():
            pass


def test_who_waited_for_the_lock_finds_the_zoo_complete(tmp_path, monkeypatch, undisturbed):
    output = tmp_path / "zoo.h5"
    locked = ShardFolder.locked

    def others_first(self, part=None):
        monkeypatch.setattr(ShardFolder, "locked", locked)
        make(output)
        return locked(self, part)

    monkeypatch.setattr(ShardFolder, "locked", others_first)
    report = make(output)
    assert (report.digest, report.trained) == (undisturbed, 0)
    assert list(tmp_path.iterdir()) == [output]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_locks.fcntl, "flock", no_locks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ShardFolder(tmp_path / "zoo.h5").locked():
            pass
    with (
        pytest.warns(UserWarning, match="has no locks: two processes"),
        ShardFolder(tmp_path / "a.h5").locked(),
    ):
        pass


# -- states ------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path):
    found = ShardState(tmp_path / "shard-00000.state", every=0.0)
    found.save({"weights": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array([7])})
    return found


def test_a_state_comes_back(state):
    found = ShardState(state.path).load()
    np.testing.assert_array_equal(found["weights"], [[0, 1, 2], [3, 4, 5]])
    assert found["step"].tolist() == [7]
    state.remove()
    state.remove()
    assert state.load() is None
    nowhere = ShardState()
    assert (nowhere.load(), nowhere.is_due) == (None, False)
    nowhere.remove()


def test_a_state_is_due_when_its_time_has_come(state, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(_shards.time, "monotonic", lambda: now[0])
    slow = ShardState(state.path, every=120.0)
    now[0] += 119.0
    assert not slow.is_due
    now[0] += 1.0
    assert slow.is_due
    slow.save({"step": np.array([8])})
    assert not slow.is_due


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.99])
def test_a_damaged_state_is_ignored(state, share):
    content = state.path.read_bytes()
    state.path.write_bytes(content[: int(share * len(content))])
    assert state.load() is None


def test_no_flipped_bit_goes_unnoticed(state):
    content = state.path.read_bytes()
    expected = {name: array.tobytes() for name, array in state.load().items()}
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1
        state.path.write_bytes(damaged)
        found = state.load()  # None, or what was saved: some bytes of the header are white space
        assert found is None or {name: array.tobytes() for name, array in found.items()} == expected


def test_a_state_that_cannot_be_written_is_one_sentence(state, monkeypatch):
    before = state.load()["step"].tolist()

    def full(arrays, path, metadata):
        raise _shards.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(_shards, "save_file", full)
    with pytest.raises(OutputError, match=r"00\.state could not be written \(No space left on device\)"):
        state.save({"step": np.array([9])})
    assert state.load()["step"].tolist() == before
    assert [path.name for path in state.path.parent.iterdir()] == [state.path.name]


# -- the folder --------------------------------------------------------------------------------------------


def test_only_what_killed_writers_left_is_tidied(tmp_path):
    folder = ShardFolder(tmp_path / "zoo.h5")
    folder.open(PLAN, overwrite=False)
    (folder.path / ".shard-00001.h5.12-ab.tmp").touch()
    (tmp_path / ".zoo.h5.12-0af3.tmp").touch()
    for other in (".zoo.h5.other.h5.12-0af3.tmp", ".zooxh5.12-0af3.tmp", "zoo.h5.12.tmp"):
        (tmp_path / other).touch()
    folder.tidy()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".zoo.h5.other.h5.12-0af3.tmp",
        ".zooxh5.12-0af3.tmp",
        "zoo.h5.12.tmp",
        "zoo.h5.parts",
    ]
    assert sorted(path.name for path in folder.path.iterdir()) == ["lock-open", "recipe.json"]


def test_a_record_in_another_layout_is_the_same_record(tmp_path):
    folder = ShardFolder(tmp_path / "zoo.h5")
    folder.open(PLAN, overwrite=False)
    folder.record.write_text(json.dumps(PLAN, indent=4))
    folder.open(PLAN, overwrite=False)
    assert folder.plan() == PLAN
    with pytest.raises(OutputError, match=r"holds shards of another recipe \(seed: 0 there, 1 now\)"):
        folder.open({**PLAN, "recipe": {"name": "a", "seed": 1}}, overwrite=False)


def test_overwriting_keeps_the_locks_and_shards_of_the_same_plan(tmp_path):
    folder = ShardFolder(tmp_path / "zoo.h5")
    with folder.locked():
        folder.open(PLAN, overwrite=False)
        folder.shard(0).touch()
        folder.open(PLAN, overwrite=True)
        assert folder.shard(0).exists()
        folder.open({**PLAN, "shard": 4}, overwrite=True)
        assert not folder.shard(0).exists()
        with pytest.raises(OutputError, match="is being written by"), ShardFolder(folder.output).locked():
            pass


def test_what_a_process_that_was_killed_while_removing_left_is_removed(tmp_path, undisturbed):
    output = make(tmp_path / "zoo.h5").output
    folder = ShardFolder(output)
    with folder.locked():
        folder.open(load_recipe_plan(output), overwrite=False)
        folder.shard(2).touch()
    assert make(output).digest == undisturbed
    assert list(tmp_path.iterdir()) == [output]
    folder.path.mkdir()
    (folder.path / "lock").touch()
    make(output)
    assert list(tmp_path.iterdir()) == [output]
    folder.path.mkdir()
    (folder.path / "thesis.txt").touch()
    make(output)
    assert (folder.path / "thesis.txt").exists()


def load_recipe_plan(output):
    """What the shards of a zoo were made from."""
    recipe = load_recipe("digits-inr", {**SMALL, "count": 8, "views": 1, "seed": 0})
    return recipe.work(recipe.source.load(None), "cpu").plan


# -- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0/4", "5/4", "x", "", "1/0", "-1/4", "1/4/2", "1.5/4", "3 of 4", "4/"])
def test_parts_that_do_not_exist_are_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"shards: expected I/N with I from 1 to N, .* found "):
        make(tmp_path / "zoo.h5", shards=text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_shard_is_in_one_part(of):
    parts = [Part(index, of).select(range(5)) for index in range(1, of + 1)]
    assert sorted(number for part in parts for number in part) == list(range(5))
    assert parts[0][0] == 0


@pytest.mark.parametrize("finish", ["join", "generate"])
def test_parts_are_joined_to_the_undisturbed_zoo(tmp_path, undisturbed, finish):
    output = tmp_path / "zoo.h5"
    done = [
        (r.shards_done, r.trained, r.joined, r.digest)
        for r in (make(output, shards=f"{i}/2") for i in (2, 1))
    ]
    assert done == [(1, 3, False, None), (3, 5, False, None)]
    assert not output.exists()
    again = make(output, shards="1/2")
    assert (again.trained, again.shards_done) == (0, 3)
    report = join_shards(output) if finish == "join" else make(output)
    assert (report.digest, report.trained, report.joined) == (undisturbed, 0, True)
    assert verify_digest(output) == undisturbed
    assert list(tmp_path.iterdir()) == [output]
    late = make(output, shards="2/2")
    assert (late.joined, late.trained, late.digest) == (True, 0, undisturbed)
    assert list(tmp_path.iterdir()) == [output]


def test_missing_and_damaged_shards_are_named(tmp_path, undisturbed):
    output = tmp_path / "zoo.h5"
    make(output, shards="2/2")
    command = re.escape(f"`weightspace generate digits-inr -o {output}`")
    with pytest.raises(
        OutputError,
        match=rf"2 of 3 shards are missing or damaged .*\(shard-00000.h5, shard-00002.h5\); {command}",
    ):
        join_shards(output)
    make(output, shards="1/2")
    shard = ShardFolder(output).shard(1)
    content = bytearray(shard.read_bytes())
    content[Zoo.open(shard)["inr"].weights.offset + 5] ^= 8
    shard.write_bytes(content)
    with pytest.raises(OutputError, match=r"1 of 3 shards are missing or damaged .*\(shard-00001.h5\)"):
        join_shards(output)
    assert not output.exists()
    report = make(output)
    assert (report.digest, report.trained) == (undisturbed, 3)


def test_joining_needs_shards_of_data_that_did_not_change(tmp_path):
    output = tmp_path / "zoo.h5"
    with pytest.raises(
        OutputError, match=r"zoo\.h5\.parts is no folder of shards \(it has no recipe\.json\)"
    ):
        join_shards(output)
    make(output, shards="1/1")
    record = ShardFolder(output).record
    plan = json.loads(record.read_text())
    record.write_text(json.dumps({**plan, "data": "0" * 64}))
    with pytest.raises(OutputError, match="the source's items differ"):
        join_shards(output)
    for text in ("{", "[]", "{}", json.dumps({**plan, "recipe": {"name": 1}})):
        record.write_text(text)
        with pytest.raises(OutputError, match=r"recipe\.json is damaged"):
            join_shards(output)
    record.write_text(json.dumps(plan))
    output.write_text("notes")
    with pytest.raises(OutputError, match="was not made by this recipe from this data"):
        join_shards(output)
    assert join_shards(output, overwrite=True).joined


def test_joining_reads_the_data_again(tmp_path, data_root):
    recipe = {"network.hidden": [8], "protocol.steps": 1, "shard": 4}
    output = tmp_path / "zoo.h5"
    generate(
        "mnist-inr", output, count=8, data_root=data_root, overrides=recipe, progress=False, shards="1/1"
    )
    with pytest.raises(DataError, match="--data-root"):
        join_shards(output)
    zoo = Zoo.open(join_shards(output, data_root=data_root).output)
    (source,) = zoo.sources.values()
    assert source.get(zoo["inr"].source).shape == (8, 28, 28)


# -- room --------------------------------------------------------------------------------------------------


MANY = {"protocol.steps": 1, "network.hidden": [32, 32], "shard": 250}


def needed(error):
    """Bytes, from the message."""
    return 1e6 * float(re.search(r"needs about (\S+) MB", str(error.value))[1])


@pytest.fixture
def free(monkeypatch):
    """How much room the disk has: the one number in a list."""
    found = [0]
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(_generate.shutil, "disk_usage", lambda _: usage._replace(free=found[0]))
    return found


def test_room_is_asked_for_before_anything_is_written(tmp_path, free):
    with pytest.raises(
        OutputError, match=rf"^output: needs about \S+ MB in {tmp_path}, found 0 MB free$"
    ) as error:
        make(tmp_path / "zoo.h5", count=500, changes=MANY)
    assert list(tmp_path.iterdir()) == []
    free[0] = 100_000_000
    size = make(tmp_path / "zoo.h5", count=500, changes=MANY).output.stat().st_size
    assert 2 * size <= needed(error) <= 2.4 * size


def test_shards_that_are_there_need_no_room(tmp_path, free):
    free[0] = 100_000_000
    output = tmp_path / "zoo.h5"
    make(output, count=500, changes=MANY, shards="1/2")
    free[0] = 0
    assert make(output, count=500, changes=MANY, shards="1/2").trained == 0
    size = ShardFolder(output).size
    with pytest.raises(OutputError, match="needs about") as error:
        make(output, count=500, changes=MANY, shards="2/2")
    assert needed(error) <= 1.4 * size  # the other half
    with pytest.raises(OutputError, match="needs about") as error:
        make(output, count=500, changes=MANY)
    assert 3 * size <= needed(error) <= 3.8 * size  # and the zoo
