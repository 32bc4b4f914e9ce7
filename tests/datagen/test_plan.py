"""Plans: what a recipe makes is counted, what it costs is measured, and both agree with what then happens."""

import json
import os
import subprocess
import sys

import pytest

from weightspace.datagen import generate, load_recipe, plan
from weightspace.datagen._inrs import INRWork
from weightspace.datagen._plan import _outline_by_trial
from weightspace.datagen._work import Work
from weightspace.errors import OutputError, RecipeError
from weightspace.zoo import Zoo

SMALL = {"source.size": 8, "network.hidden": [16, 16], "protocol.steps": 30, "shard": 100}


def small_work(**overrides):
    recipe = load_recipe("digits-inr", {**SMALL, **overrides})
    return recipe.work(recipe.source.load(None), "cpu")


def test_a_plan_counts_what_will_be_made(tmp_path):
    found = plan("digits-inr", tmp_path / "zoo.h5", count=250, views=2, overrides=SMALL, seconds=0.1)
    report = generate("digits-inr", tmp_path / "zoo.h5", count=250, views=2, overrides=SMALL, progress=False)
    inr = Zoo.open(report.output)["inr"]
    assert (found.networks, found.rows, found.populations) == (inr.networks, inr.rows, 1) == (500, 500, 1)
    assert found.parameters == (inr.spec.num_parameters,) * 3
    assert found.shards == report.shards == 5
    size = report.output.stat().st_size
    assert size <= found.file_bytes <= 1.3 * size
    assert found.disk_bytes == 2 * found.file_bytes
    assert found.folder == tmp_path.resolve()
    assert found.free_bytes > 0


def test_a_plan_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan("digits-inr", count=10, overrides=SMALL, seconds=0.05)
    assert list(tmp_path.iterdir()) == []
    assert found.folder == tmp_path.resolve()
    with pytest.raises(OutputError, match=r"output: directory .* does not exist"):
        plan("digits-inr", tmp_path / "no" / "zoo.h5", overrides=SMALL)
    with pytest.raises(RecipeError, match="has 1797 items, found 1798"):
        plan("digits-inr", count=1798)


def test_time_and_memory_are_about_right(tmp_path):
    """In processes of their own: how much this one has had already says nothing about a run."""
    code = """
import json, resource, sys
from weightspace.datagen import generate, plan
overrides = {"shard": 64}
if sys.argv[1] == "plan":
    found = plan("digits-inr", count=128, overrides=overrides)
    print(json.dumps([found.seconds, found.memory_bytes]))
else:
    report = generate("digits-inr", sys.argv[2], count=128, overrides=overrides, progress=False)
    print(json.dumps([report.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
    (seconds, memory), (taken, peak) = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code, what, str(tmp_path / "zoo.h5")],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for what in ("plan", "generate")
    )
    assert taken / 3 <= seconds <= 3 * taken  # 1.5 where nothing else runs; tests do not run alone
    assert peak / 1.5 <= memory <= 1.5 * peak


@pytest.fixture
def clock(monkeypatch):
    """Trials that take 1 ms per step and network, and stop early after so many steps; how long all took."""
    found = {"stop": 10**9, "spent": 0.0}

    def trial(self, shard, networks):
        networks = min(networks, shard.networks)
        seconds = 1e-3 * networks * min(found["stop"], self.recipe.protocol.steps)
        found["spent"] += seconds
        return networks, None, seconds

    monkeypatch.setattr(INRWork, "trial", trial)
    return found


@pytest.mark.parametrize(("steps", "stop"), [(100_000, 10**9), (400, 10**9), (400, 40), (30, 10**9), (5, 2)])
def test_the_rate_is_that_of_whole_fits_and_the_probe_keeps_to_its_time(clock, steps, stop):
    work = small_work(**{"protocol.steps": steps, "protocol.target_psnr": None})
    clock["stop"] = stop
    assert work.probe(2.0) == pytest.approx(1e3 / min(steps, stop), rel=1e-6)
    assert clock["spent"] < 5.0


@pytest.fixture
def generic(monkeypatch):
    """INRs that know nothing beyond what any work has to."""
    for name in ("outline", "probe", "memory"):
        monkeypatch.setattr(INRWork, name, getattr(Work, name))
    return small_work()


def test_work_that_says_nothing_of_itself_can_be_planned(generic, tmp_path):
    assert generic.outline() == []
    assert generic.probe(0.1) > 1
    (found,) = _outline_by_trial(generic)
    assert (found.name, found.networks, found.rows) == ("inr", generic.networks, generic.networks)
    assert found.parameters == generic.spec.num_parameters
    planned = plan("digits-inr", count=250, overrides=SMALL, seconds=0.05)
    assert (planned.rows, planned.populations) == (250, 1)
    generate("digits-inr", tmp_path / "zoo.h5", count=4, overrides=SMALL, progress=False)


def test_a_trial_makes_the_first_networks_of_a_shard_as_they_will_be():
    work = small_work()
    networks, zoo, seconds = work.trial(work.shards[1], 3)
    assert (networks, zoo["inr"].networks) == (3, 3)
    assert seconds > 0
    whole = work.make(work.shards[1], _no_state(), lambda _: None)
    assert (whole["inr"].weights[:3] == zoo["inr"].weights).all()
    assert work.trial(work.shards[-1], 1000)[0] == work.shards[-1].networks


def _no_state():
    from weightspace.datagen._shards import ShardState

    return ShardState()


def test_a_plan_reads_as_a_table():
    found = plan("digits-inr", count=10, overrides=SMALL, seconds=0.05)
    lines = dict(line.split(None, 1) for line in str(found).splitlines())
    assert lines["recipe"] == "digits-inr"
    assert lines["networks"] == "10 in 1 shard"
    assert lines["parameters"] == str(2 * 16 + 16 + 16 * 16 + 16 + 16 + 1)
    assert lines["time"].endswith("networks/s on cpu")
    assert "while shards are joined" in lines["disk"]
    assert str(os.getcwd()) in lines["disk"]
