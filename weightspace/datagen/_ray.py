"""Shards as tasks of a Ray cluster (https://docs.ray.io); a lost worker or node costs the shards that it was making.

Tasks get the data through Ray's object store and return finished shards through it, so that the machines need no
file system in common and only the driver, which holds the lock, writes. The states of unfinished shards go the same
way: a shard that is made again goes on from its last one, on whatever node.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch

from weightspace.datagen._engines import ShardEngine, Tell
from weightspace.datagen._recipe import Recipe
from weightspace.datagen._shards import SAVE_EVERY, ShardFolder, ShardState
from weightspace.datagen._work import Shard, Work
from weightspace.datagen.sources import Signals
from weightspace.errors import ConfigError, OutputError

RETRIES = 10  # of one shard, whose worker or node was lost
_PATIENCE = 5.0  # seconds for a cluster to answer
_HEALTH = 30.0  # seconds for Ray's own check, which has to start Python
_POLL = 0.5  # seconds between two looks at the progress
_TELL = 0.5  # seconds between two messages of a task
_DEFAULT_PORTS = {"": 6379, "ray://": 10001}


class RayEngine(ShardEngine):
    """Every shard is a task with one CPU and one thread, or with one GPU.

    Args:
        address: ``HOST:PORT`` of a cluster's head, ``ray://HOST:PORT`` of its client server, or ``auto`` for one that
            runs on this machine; None for the environment variable ``RAY_ADDRESS``, else for a cluster that is started
            on this machine and ends with the engine. In a process that is connected already that connection is used.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str | None) -> None:
        self.ray = _installed()
        self._is_ours = not self.ray.is_initialized()
        if self._is_ours:
            _connect(self.ray, address or os.environ.get("RAY_ADDRESS") or "local")

    def __enter__(self) -> RayEngine:
        """Ray prints what it has to say about lost workers on standard output, which is for results."""
        self._redirection = redirect_stdout(sys.stderr)
        self._redirection.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cluster; one that was started for this engine ends."""
        if self._is_ours:
            self.ray.shutdown()
        self._redirection.__exit__(kind, error, trace)

    def make(self, work: Work, shards: Sequence[Shard], folder: ShardFolder, tell: Tell) -> None:
        """See :class:`ShardEngine`."""
        run = _Run(self.ray, work, folder, tell)
        try:
            run.all(shards)
        finally:
            run.stop()


def _installed() -> ModuleType:
    # a run reports nothing to anybody unless its user has decided otherwise; has to be set before the import
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"engine: 'ray' needs the package of that name (pip install 'weightspace[ray]'): {error}"
        ) from None
    module: ModuleType = ray
    return module


def _connect(ray: ModuleType, address: str) -> None:
    _check_reachable(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except Exception as error:  # of as many kinds as there are reasons
        ray.shutdown()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"address: no Ray cluster could be reached at {address} ({reason})") from None


def _check_reachable(address: str) -> None:
    """Ray itself would wait for minutes."""
    match = re.fullmatch(r"(ray://)?(\[[^\]]+\]|[^:/\[\]]+)(?::(\d+))?", address)
    if address in ("auto", "local"):
        return
    if match is None:
        raise ConfigError(f"address: expected HOST:PORT, ray://HOST:PORT or auto, found {address!r}")
    host, port = match[2].strip("[]"), int(match[3] or _DEFAULT_PORTS[match[1] or ""])
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"address: no Ray cluster could be reached at {address} ({reason})") from None
    if match[1] is None and not _is_head(f"{match[2]}:{port}"):
        raise ConfigError(f"address: what answers at {address} is not the head of a Ray cluster")


def _is_head(address: str) -> bool:
    """Whether Ray's own check finds a cluster; in a process of its own, as it may wait for minutes."""
    code = "from ray.scripts.scripts import main; main()"
    command = [sys.executable, "-c", code, "health-check", "--address", address, "--skip-version-check"]
    try:
        return subprocess.run(command, capture_output=True, timeout=_HEALTH, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class _Run:
    """The driver's side: tasks that run, and what came of them."""

    def __init__(self, ray: ModuleType, work: Work, folder: ShardFolder, tell: Tell) -> None:
        self.ray, self.folder, self.tell = ray, folder, tell
        self.every = SAVE_EVERY
        self.data = ray.put((work.recipe, work.signals, work.device))
        self.task = ray.remote(num_cpus=1, num_gpus=1 if work.device == "cuda" else 0, max_retries=RETRIES)(
            make_shard
        )
        self.keeper = ray.remote(num_cpus=0, max_restarts=-1)(Keeper).remote()
        self.running: dict[Any, Shard] = {}
        self.finished: list[int] = []

    def all(self, shards: Sequence[Shard]) -> None:
        """Until every shard is in the folder."""
        waiting = deque(shards)
        while waiting or self.running:
            while waiting and len(self.running) < self._room():
                shard = waiting.popleft()
                saved = self.folder.state(shard.number).load()
                self.running[self.task.remote([self.data], shard, saved, self.keeper, self.every)] = shard
            ready, _ = self.ray.wait(list(self.running), timeout=_POLL)
            self._read_news()
            for reference in ready:
                self._collect(reference)

    def stop(self) -> None:
        """Tasks that still run give up."""
        for reference in self.running:
            with suppress(Exception):
                self.ray.cancel(reference, force=True)
        del self.keeper  # which ends when nobody has it

    def _room(self) -> int:
        """Tasks that may run or wait: some more than there are places, which may grow in number at any time."""
        return 2 + 2 * int(self.ray.cluster_resources().get("CPU", 1))

    def _collect(self, reference: Any) -> None:
        shard = self.running.pop(reference)
        content = self._result(reference, shard)
        self.folder.save_file(shard.number, content.data)
        self.finished.append(shard.number)
        self.tell(shard.number, shard.networks)

    def _result(self, reference: Any, shard: Shard) -> np.ndarray:
        errors = self.ray.exceptions
        try:
            found: np.ndarray = self.ray.get(reference)
        except errors.RayTaskError as error:  # the task's own
            cause = getattr(error, "cause", None)
            if isinstance(cause, ImportError):
                raise ConfigError(
                    f"engine: a worker of the cluster cannot import what it needs: {cause}"
                ) from None
            raise (cause or error) from None
        except errors.RayError as error:
            raise OutputError(
                f"engine: {self.folder.shard(shard.number).name} was lost {RETRIES + 1} times "
                f"({type(error).__name__}); what is finished is kept, the same command goes on from there"
            ) from None
        return found

    def _read_news(self) -> None:
        """Progress, and states that are written here, for whoever goes on after this process has been killed."""
        with suppress(
            self.ray.exceptions.RayError
        ):  # the keeper's node was lost; another one is being started
            progress, states = self.ray.get(self.keeper.news.remote(self.finished), timeout=10 * _PATIENCE)
            self.finished = []
            running = {shard.number for shard in self.running.values()}
            for number in running & set(progress):
                self.tell(number, progress[number])
            for number in running & set(states):
                self.folder.state(number).save(states[number])


class Keeper:
    """The actor that hears of progress, and keeps the last state of each shard."""

    def __init__(self) -> None:
        self._progress: dict[int, int | float] = {}
        self._states: dict[int, Mapping[str, np.ndarray]] = {}
        self._new: set[int] = set()

    def tell(self, number: int, networks: int | float) -> None:
        """A shard has finished some networks."""
        self._progress[number] = networks

    def save(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """A shard's state."""
        self._states[number] = arrays
        self._new.add(number)

    def load(self, number: int) -> Mapping[str, np.ndarray] | None:
        """A shard's last state."""
        return self._states.get(number)

    def news(
        self, finished: Sequence[int]
    ) -> tuple[dict[int, int | float], dict[int, Mapping[str, np.ndarray]]]:
        """Progress of all, and states that were not asked for yet.

        Args:
            finished: shards that can be forgotten.
        """
        for number in finished:
            self._progress.pop(number, None)
            self._states.pop(number, None)
            self._new.discard(number)
        new, self._new = {number: self._states[number] for number in self._new}, set()
        return dict(self._progress), new


# -- the worker's side -------------------------------------------------------------------------------------


class _KeptState(ShardState):
    """A state that is kept by the actor."""

    def __init__(
        self, number: int, saved: Mapping[str, np.ndarray] | None, keeper: Any, every: float
    ) -> None:
        super().__init__(None, every)
        self.number, self.saved, self.keeper = number, saved, keeper

    def load(self) -> dict[str, np.ndarray] | None:
        import ray

        found = self.saved
        with suppress(ray.exceptions.RayActorError):  # lost with its node, as are the states that it kept
            found = ray.get(self.keeper.load.remote(self.number)) or self.saved
        # what comes out of the object store cannot be written to
        return None if found is None else {name: np.array(array) for name, array in found.items()}

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= self.every

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        import ray

        ray.get(
            self.keeper.save.remote(self.number, {name: np.array(array) for name, array in arrays.items()})
        )
        self._saved = time.monotonic()


_works: dict[Any, Work] = {}  # of the run that this process works for


def make_shard(
    data: Sequence[Any], shard: Shard, saved: Mapping[str, np.ndarray] | None, keeper: Any, every: float
) -> np.ndarray:
    """One shard as the bytes of its file.

    Args:
        data: reference to recipe, signals and device, in a list, as Ray would fetch it for every task otherwise.
        shard: which one.
        saved: its state in the driver's folder.
        keeper: the actor.
        every: seconds between two states.
    """
    torch.set_num_threads(1)
    work = _work_of(data[0])
    told = time.monotonic()

    def progress(networks: int | float) -> None:
        nonlocal told
        if time.monotonic() - told > _TELL:
            told = time.monotonic()
            keeper.tell.remote(shard.number, networks)

    zoo = work.make(shard, _KeptState(shard.number, saved, keeper, every), progress)
    with tempfile.TemporaryDirectory() as folder:
        return np.fromfile(zoo.save(Path(folder) / "shard.h5"), dtype=np.uint8)


def _work_of(reference: Any) -> Work:
    import ray

    if reference not in _works:
        _works.clear()
        recipe: Recipe
        signals: Signals
        recipe, signals, device = ray.get(reference)
        # compiled code is typed for arrays that can be written to, which those in the object store cannot
        _works[reference] = recipe.work(copy.deepcopy(signals), device)
    return _works[reference]
