"""Shards as tasks of a Ray cluster: equal bits, and lost workers and nodes cost nothing but time."""

import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from weightspace.datagen import _engines, generate
from weightspace.errors import ConfigError, RecipeError

SMALL = {"source.size": 8, "network.hidden": [8], "protocol.steps": 20, "shard": 3}


def make(output, *, changes=None, **options):
    overrides = {**SMALL, **(changes or {})}
    return generate("digits-inr", output, count=8, seed=0, overrides=overrides, progress=False, **options)


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="engine: expected one of local, ray, found 'slurm'"):
        make(tmp_path / "zoo.h5", engine="slurm")
    with pytest.raises(ConfigError, match="address: expected none for the engine 'local', found 'auto'"):
        make(tmp_path / "zoo.h5", address="auto")


def test_an_engine_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine: 'ray' needs the package of that name \(pip install"):
        make(tmp_path / "zoo.h5", engine="ray")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray")


def test_an_address_where_nobody_answers_is_refused_at_once(tmp_path, ray):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    for place in (address, f"ray://{address}"):
        with pytest.raises(ConfigError, match=rf"address: no Ray cluster could be reached at {place} \("):
            make(tmp_path / "zoo.h5", engine="ray", address=place)
    with pytest.raises(ConfigError, match=r"address: expected HOST:PORT, .* found 'http://x/y'"):
        make(tmp_path / "zoo.h5", engine="ray", address="http://x/y")
    assert time.monotonic() - start < 10
    assert list(tmp_path.iterdir()) == []


def test_a_stranger_who_answers_is_no_cluster(tmp_path, ray, monkeypatch):
    from weightspace.datagen import _ray

    monkeypatch.setattr(_ray, "_HEALTH", 3.0)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        address = f"127.0.0.1:{stranger.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"what answers at {address} is not the head of a Ray cluster"):
            make(tmp_path / "zoo.h5", engine="ray", address=address)


@pytest.fixture(scope="module")
def cluster(ray):
    """A head that makes no shards, and one node that does; workers check no types, as elsewhere."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.add_node(num_cpus=2)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("local") / "zoo.h5").digest


def test_bits_are_those_of_the_local_engine(tmp_path, cluster, undisturbed, capsys):
    output = tmp_path / "zoo.h5"
    report = make(output, engine="ray", address=cluster.address)
    assert (report.digest, report.trained, report.joined) == (undisturbed, 8, True)
    assert list(tmp_path.iterdir()) == [output]
    part = make(tmp_path / "part.h5", engine="ray", address=cluster.address, shards="2/2")
    assert (part.shards_done, part.joined) == (1, False)
    assert make(tmp_path / "part.h5").digest == undisturbed
    assert capsys.readouterr().out == ""


def test_errors_of_a_task_are_the_users(tmp_path, cluster):
    with pytest.raises(RecipeError, match="has 1797 items, found 1798"):
        generate("digits-inr", tmp_path / "zoo.h5", count=1798, engine="ray", address=cluster.address)


LONG = {"protocol.steps": 10_000, "protocol.target_psnr": None}


def wait_until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def busy_workers():
    """Processes below this one that make a shard; Ray names them so."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in lines.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def is_ours(pid):
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parents.get(pid, 0)
        return False

    return [int(pid) for pid, _, text in rows if text.startswith("ray::make_shard") and is_ours(int(pid))]


def in_thread(run):
    found = {}

    def target():
        try:
            found["report"] = run()
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=target)
    thread.start()
    return thread, found


@pytest.mark.parametrize("loss", ["worker", "node"])
def test_what_is_lost_is_made_again(tmp_path, cluster, loss, capsys):
    """The node that is lost is the only one that makes shards; another one comes in its place."""
    local = make(tmp_path / "local.h5", changes=LONG)
    thread, found = in_thread(
        lambda: make(tmp_path / "zoo.h5", changes=LONG, engine="ray", address=cluster.address)
    )
    try:
        wait_until(lambda: busy_workers() or not thread.is_alive())
        assert thread.is_alive(), found
        if loss == "worker":
            os.kill(busy_workers()[0], 9)
        else:
            (node,) = cluster.worker_nodes
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=2)
    finally:
        thread.join()
    assert "report" in found, found
    assert found["report"].digest == local.digest
    assert found["report"].trained == 8
    assert capsys.readouterr().out == ""  # Ray tells of it, but not where results are printed


def test_states_go_to_the_folder_and_come_back(tmp_path, cluster, ray):
    """What a long shard saves on a worker is what it finds when it is made again."""
    from weightspace.datagen import _ray

    with _engines.choose_engine("ray", cluster.address):
        keeper = ray.remote(num_cpus=0)(_ray.Keeper).remote()
        state = _ray._KeptState(3, None, keeper, every=0.0)
        assert state.load() is None
        assert state.is_due
        state.save({"step": np.arange(3)})
        again = _ray._KeptState(3, {"step": np.zeros(3)}, keeper, every=60.0)
        assert not again.is_due
        found = again.load()
        found["step"] += 1  # it can be written to
        assert found["step"].tolist() == [1, 2, 3]
        _, states = ray.get(keeper.news.remote([]))
        assert states[3]["step"].tolist() == [0, 1, 2]
        assert ray.get(keeper.news.remote([]))[1] == {}
        ray.get(keeper.news.remote([3]))
        assert again.load()["step"].tolist() == [0, 0, 0]
