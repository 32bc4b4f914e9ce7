"""From a recipe to a zoo: shard after shard, resumable at any moment."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from weightspace.datagen._engines import ShardEngine, choose_engine
from weightspace.datagen._recipe import Recipe, load_recipe, override_recipe, parse_recipe
from weightspace.datagen._shards import Part, ShardFolder
from weightspace.datagen._work import Shard, Work, zoo_bytes
from weightspace.devices import choose_device
from weightspace.errors import OutputError, WeightspaceError, ZooError
from weightspace.zoo import Zoo, join_zoos

_TRIES = 3  # a shard that is damaged again and again is a failing disk
_NAMED = 8  # missing shards that a message names


@dataclass(frozen=True)
class GenerateReport:
    """What was made.

    Attributes:
        output: the zoo.
        joined: whether the zoo is complete; else its shards wait in ``<output>.parts``.
        digest: of its content; None where it is not joined.
        networks: in the zoo.
        trained: by this call.
        diverged: networks whose training ended in numbers that are not finite; None where it is not joined.
        metric: by which the population is judged at a glance; None where it is not joined.
        median: of that metric over the networks; NaN where it is not joined.
        networks_per_second: of those that this call trained.
        seconds: that this call took.
        shards: of the zoo.
        shards_done: by this call and others.
    """

    output: Path
    joined: bool
    digest: str | None
    networks: int
    trained: int
    diverged: int | None
    metric: str | None
    median: float
    networks_per_second: float
    seconds: float
    shards: int
    shards_done: int


def generate(
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    count: int | None = None,
    views: int | None = None,
    seed: int | None = None,
    data_root: str | Path | None = None,
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    shards: str | None = None,
    engine: str = "local",
    address: str | None = None,
) -> GenerateReport:
    """Train a population and write it as one zoo; the same call resumes what was interrupted.

    Args:
        recipe: a built-in name, the path of a YAML file, or a ``Recipe``.
        output: the zoo to write; finished shards wait in ``<output>.parts`` until it is complete.
        count: number of items to fit, or of classifiers to train (the recipe's, else all).
        views: networks per item.
        seed: of everything random.
        data_root: folder with the source's files, for recipes that need some.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        overrides: any field of the recipe by its dotted name.
        overwrite: replace an existing zoo, or shards of another recipe.
        progress: show a bar with networks per second and the time left, on standard error.
        shards: make one part only, such as ``"3/16"``: every 16th shard, beginning with the third. They are left in
            ``<output>.parts``, which several machines may share, for :func:`join_shards` or a call without ``shards``.
        engine: ``"local"``: in this process; ``"ray"``: as tasks of a Ray cluster, from which the finished shards
            come back to this process, so that the cluster needs no file system in common.
        address: of the Ray cluster; by default the one of the environment variable ``RAY_ADDRESS``, else one that is
            started on this machine for this call.

    Raises:
        RecipeError: unknown recipe or field, or a count beyond the data set.
        ConfigError: an unknown engine or part, or an engine that is not installed or not reachable.
        DataError: source files are missing or damaged.
        OutputError: the output exists and was made by another recipe, is being written by another process, has no
            room where it should be, or cannot be written.
        DeviceError: ``"cuda"`` without CUDA.
    """
    recipe = resolve_recipe(recipe, overrides, count=count, views=views, seed=seed)
    part = Part.parse(shards) if shards is not None else None
    # a driver without a GPU may use those of a cluster
    device = choose_device(device) if engine == "local" or device == "auto" else device
    with choose_engine(engine, address) as maker:
        return Generation(recipe, Path(output), data_root, device, overwrite, part).run(progress, maker)


def join_shards(
    output: str | Path, *, data_root: str | Path | None = None, overwrite: bool = False
) -> GenerateReport:
    """Join the shards in ``<output>.parts``, of which all have to be there; ``generate`` does so as well.

    Args:
        output: the zoo to write.
        data_root: folder with the source's files, for recipes that need some: the zoo stores the signals.
        overwrite: replace an existing zoo.

    Raises:
        DataError: source files are missing or damaged.
        OutputError: no shards, or not all of them, or they are being written, or the output exists.
    """
    output = Path(output)
    plan = ShardFolder(output).plan()
    try:
        recipe = parse_recipe({**plan["recipe"], "shard": plan["shard"]})
    except (KeyError, ValueError):  # pydantic's errors and those of recipes are such
        raise OutputError(f"output: {output}.parts/recipe.json is damaged, or of another version") from None
    return Generation(recipe, output, data_root, str(plan["device"]), overwrite).join()


def resolve_recipe(
    recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None = None, **flags: Any
) -> Recipe:
    """A recipe by name, path or value, with some fields changed; flags that are None change nothing.

    Raises:
        RecipeError: unknown recipe or field, or a value out of range.
    """
    changes = {**(overrides or {}), **{key: value for key, value in flags.items() if value is not None}}
    return override_recipe(recipe, changes) if isinstance(recipe, Recipe) else load_recipe(recipe, changes)


class Generation:
    """One run: where it writes, which shards are missing, and joining them.

    Args:
        recipe: what to make.
        output: the zoo.
        data_root: folder with the source's files.
        device: ``"cpu"`` or ``"cuda"``.
        overwrite: replace what is there.
        part: of the shards; None for all, which are then joined.

    Raises:
        OutputError: the output cannot be written, has no room, or was made by another recipe.
        DataError: source files are missing or damaged.
        RecipeError: the data do not fit the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        data_root: str | Path | None,
        device: str,
        overwrite: bool,
        part: Part | None = None,
    ) -> None:
        self.recipe, self.output, self.overwrite, self.part = recipe, output, overwrite, part
        self.folder = ShardFolder(output)
        self._check_place()
        signals = recipe.source.load(Path(data_root) if data_root is not None else None)
        self.work: Work = recipe.work(signals, device)
        self.shards = list(self.work.shards) if part is None else part.select(self.work.shards)
        self._check_output()

    def run(self, progress: bool, engine: ShardEngine) -> GenerateReport:
        """Make what is missing, and join all unless only a part was asked for."""
        start, trained = time.perf_counter(), 0
        if not self._is_complete():
            self.folder.check(self.work.plan, overwrite=self.overwrite)
            self._check_room()
            with self.folder.locked(self.part):
                if not self._is_complete():  # who held the lock before us may have completed it
                    self.folder.open(self.work.plan, overwrite=self.overwrite)
                    trained = self._make_all(progress, engine)
        if self.part is None:
            self._clear()
        return self._report(trained, time.perf_counter() - start)

    def join(self) -> GenerateReport:
        """Join shards that are all there."""
        start = time.perf_counter()
        if not self._is_complete():
            with self.folder.locked():
                self.folder.open(self.work.plan, overwrite=False)
                self._check_missing(self._missing())
                try:
                    self._join()
                except ZooError:
                    self._check_missing(self._damaged())
                    raise
        self._clear()
        return self._report(0, time.perf_counter() - start)

    def _make_all(self, progress: bool, engine: ShardEngine) -> int:
        """Returns the number of networks that were trained."""
        if self.part is not None:
            return self._make(self._missing(), progress, engine)
        self.folder.tidy()
        trained = 0
        for left in reversed(range(_TRIES)):
            trained += self._make(self._missing(), progress, engine)
            try:
                self._join()
                break
            except ZooError:
                # checksums are verified while joining: one pass over the shards instead of two
                damaged = self._damaged()
                if not damaged or not left:
                    raise
                for shard in damaged:
                    self.folder.discard(shard.number)
        return trained

    def _missing(self) -> list[Shard]:
        return [shard for shard in self.shards if not self.folder.has(shard.number)]

    def _damaged(self) -> list[Shard]:
        return [shard for shard in self.shards if not self.folder.is_sound(shard.number)]

    def _make(self, missing: Sequence[Shard], progress: bool, engine: ShardEngine) -> int:
        """Train some shards; returns the number of networks."""
        total = sum(shard.networks for shard in self.shards)
        trained = sum(shard.networks for shard in missing)
        done: dict[int, int | float] = {}
        with self._bar(total, total - trained, progress) as bar:

            def tell(number: int, networks: int | float) -> None:
                done[number] = networks
                bar.update(total - trained + int(sum(done.values())) - bar.n)

            if missing:
                engine.make(self.work, missing, self.folder, tell)
        return trained

    @contextmanager
    def _bar(self, total: int, done: int, progress: bool) -> Iterator[tqdm]:
        with tqdm(
            total=total,
            initial=done,
            unit=" networks",
            desc=self.recipe.name,
            disable=not progress,
            file=sys.stderr,
        ) as bar:
            yield bar

    def _join(self) -> None:
        join_zoos(
            [self.folder.shard(shard.number) for shard in self.work.shards],
            self.output,
            recipe=self.recipe.resolved(),
            sources=self.work.sources(),
            overwrite=self.overwrite,
        )

    def _clear(self) -> None:
        """Remove the shards of a zoo that is complete, also those that a killed process had no time to remove."""
        if self.folder.path.exists():
            with suppress(OutputError):  # of another recipe, or somebody looks at them
                self.folder.check(self.work.plan, overwrite=False)
                with self.folder.locked():
                    self.folder.remove()

    def _check_missing(self, missing: Sequence[Shard]) -> None:
        if missing:
            names = ", ".join(self.folder.shard(shard.number).name for shard in missing[:_NAMED])
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise OutputError(
                f"join: {len(missing)} of {len(self.work.shards)} shards are missing or damaged in {self.folder.path} "
                f"({names}{more}); `weightspace generate {self.recipe.name} -o {self.output}` with the options of the "
                "others makes them"
            )

    def _check_room(self) -> None:
        """Raise OutputError unless there is room for the shards that are missing, and for the zoo."""
        outline = self.work.outline()
        if not outline:
            return
        size = zoo_bytes(outline, self.recipe.dtype, self.work.sources())
        share = sum(shard.networks for shard in self._missing()) / self.work.networks
        needed = int(share * size) + (size if self.part is None else 0)
        folder = self.output.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OutputError(
                f"output: needs about {gigabytes(needed)} in {folder}, found {gigabytes(free)} free"
            )

    def _check_place(self) -> None:
        if not self.output.parent.is_dir():
            raise OutputError(f"output: directory {self.output.parent} does not exist")
        if self.output.is_dir():
            raise OutputError(f"output: {self.output} is a directory, expected the name of a file")

    def _check_output(self) -> None:
        if self.output.exists() and not self.overwrite and not self._is_complete():
            raise OutputError(
                f"output: {self.output} exists already and was not made by this recipe from this data; "
                "choose another name or pass --overwrite"
            )

    def _is_complete(self) -> bool:
        if not self.output.exists() or self.overwrite:
            return False
        try:
            zoo = Zoo.open(self.output)
        except WeightspaceError:
            return False
        return zoo.recipe == self.recipe.resolved() and self.work.made(zoo)

    def _report(self, trained: int, seconds: float) -> GenerateReport:
        joined = self._is_complete() if self.part is not None else True
        zoo = Zoo.open(self.output) if joined else None
        metric, median = self.work.headline(zoo) if zoo else (None, float("nan"))
        shards = self.work.shards
        return GenerateReport(
            output=self.output,
            joined=joined,
            digest=zoo.digest if zoo else None,
            networks=_networks(zoo) if zoo else self.work.networks,
            trained=trained,
            diverged=_diverged(zoo) if zoo else None,
            metric=metric,
            median=median,
            networks_per_second=trained / seconds if trained else 0.0,
            seconds=seconds,
            shards=len(shards),
            shards_done=len(shards) if joined else sum(self.folder.has(shard.number) for shard in shards),
        )


def gigabytes(size: int) -> str:
    """For people: ``"1.25 GB"``."""
    return f"{size / 1e9:.3g} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB"


def _networks(zoo: Zoo) -> int:
    return sum(population.networks for population in zoo.populations.values())


def _diverged(zoo: Zoo) -> int:
    """Networks of which a row is flagged as diverged, or has a metric that is not a number."""
    total = 0
    for population in zoo.populations.values():
        metrics = population.metrics
        bad = metrics["diverged"] > 0 if "diverged" in metrics else np.isnan(metrics["psnr"])
        total += len(np.unique(population.network[bad]))
    return total
