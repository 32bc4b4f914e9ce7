"""From a recipe to a zoo: shard after shard, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from weightspace.datagen._fit import fit_networks
from weightspace.datagen._recipe import Recipe, load_recipe, override_recipe
from weightspace.datagen.sources import Signals
from weightspace.devices import choose_device
from weightspace.errors import OutputError, RecipeError, WeightspaceError
from weightspace.nets import MLP, architecture_of, coordinate_grid
from weightspace.zoo import (
    Population,
    Source,
    Zoo,
    atomic_path,
    canonical_json,
    join_zoos,
    spec_of,
    split_items,
    verify_digest,
)

POPULATION = "inr"


@dataclass(frozen=True)
class GenerateReport:
    """What was made; ``networks_per_second`` counts the networks that this call trained."""

    output: Path
    digest: str
    networks: int
    trained: int
    diverged: int
    median_psnr: float
    networks_per_second: float
    seconds: float


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
) -> GenerateReport:
    """Train a population and write it as one zoo; the same call resumes what was interrupted.

    Args:
        recipe: a built-in name, the path of a YAML file, or a ``Recipe``.
        output: the zoo to write; finished shards wait in ``<output>.parts`` until it is complete.
        count: number of items to fit (the recipe's, else all).
        views: networks per item.
        seed: of everything random.
        data_root: folder with the source's files, for recipes that need some.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        overrides: any field of the recipe by its dotted name.
        overwrite: replace an existing zoo, or shards of another recipe.
        progress: show a bar with networks per second and the time left, on standard error.

    Raises:
        RecipeError: unknown recipe or field, or a count beyond the data set.
        DataError: source files are missing or damaged.
        OutputError: the output exists and was made by another recipe, or cannot be written.
        DeviceError: ``"cuda"`` without CUDA.
    """
    flags = {"count": count, "views": views, "seed": seed}
    changes = {**(overrides or {}), **{key: value for key, value in flags.items() if value is not None}}
    recipe = override_recipe(recipe, changes) if isinstance(recipe, Recipe) else load_recipe(recipe, changes)
    return _Generation(recipe, Path(output), data_root, choose_device(device), overwrite).run(progress)


class _Generation:
    """One run: the plan (who is fitted to what), the shards, and the joining."""

    def __init__(
        self, recipe: Recipe, output: Path, data_root: str | Path | None, device: str, overwrite: bool
    ) -> None:
        self.recipe, self.output, self.device, self.overwrite = recipe, output, device, overwrite
        self.parts = output.with_name(output.name + ".parts")
        self._check_place()
        self.signals = recipe.source.load(Path(data_root) if data_root is not None else None)
        _check_signals(recipe, self.signals)
        self.items = _selected_items(recipe, self.signals)
        self._check_output()
        self.split = _split(recipe, self.signals, self.items)
        grid, self.channels = self.signals.grid, self.signals.channels or 1
        self.net = MLP(
            (len(grid), *recipe.network.hidden, self.channels),
            activation=recipe.network.activation,
            w0=recipe.network.w0,
            output_offset=recipe.protocol.output_offset,
        )
        self.spec = spec_of(self.net)
        self.coordinates = coordinate_grid(grid).numpy()
        self.bounds = recipe.protocol.initial_bounds(self.net)

    @property
    def networks(self) -> int:
        return len(self.items) * self.recipe.views

    def run(self, progress: bool) -> GenerateReport:
        start = time.perf_counter()
        if self._is_complete():
            return self._report(0, time.perf_counter() - start)
        self._open_parts()
        shards = list(self._shards())
        missing = [shard for shard in shards if not _is_sound(self._shard_path(shard[0]))]
        trained = sum(stop - first for _, first, stop in missing)
        with tqdm(
            total=self.networks,
            initial=self.networks - trained,
            unit=" networks",
            desc=self.recipe.name,
            disable=not progress,
            file=sys.stderr,
        ) as bar:
            for number, first, stop in missing:
                population = self._fit(first, stop, bar)
                Zoo({POPULATION: population}).save(self._shard_path(number), overwrite=True)
        join_zoos(
            [self._shard_path(number) for number, _, _ in shards],
            self.output,
            recipe=self.recipe.resolved(),
            sources={self.recipe.source.kind: self._source()},
            overwrite=self.overwrite,
        )
        shutil.rmtree(self.parts)
        return self._report(trained, time.perf_counter() - start)

    # -- output and shards ---------------------------------------------------------------------------------

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
        return zoo.recipe == self.recipe.resolved() and self._same_data(zoo)

    def _same_data(self, zoo: Zoo) -> bool:
        """Whether the zoo's networks were fitted to the items that the source has now."""
        stored, now = zoo.sources.get(self.recipe.source.kind), self._source()
        population = zoo.populations.get(POPULATION)
        return (
            stored is not None
            and population is not None
            and np.array_equal(stored.index, now.index)
            and np.array_equal(stored.items, now.items)
            and set(population.labels) == set(self.signals.named_labels)
            and all(
                np.array_equal(population.labels[name], values[population.source])
                for name, values in self.signals.named_labels.items()
            )
        )

    def _open_parts(self) -> None:
        """Make the folder of shards, or continue in one of the same recipe."""
        plan = canonical_json(
            {
                "recipe": self.recipe.resolved(),
                "shard": self.recipe.shard,
                "device": self.device,
                "data": self._data_digest(),
            }
        )
        record = self.parts / "recipe.json"
        if self.parts.exists() and not record.exists() and _holds_files(self.parts):
            raise OutputError(
                f"output: {self.parts} is no folder of shards (it has no recipe.json); move it away"
            )
        if record.exists() and record.read_bytes() != plan.encode():
            if not self.overwrite:
                raise OutputError(
                    f"output: {self.parts} holds shards of another recipe ({_difference(record, plan)}); "
                    "choose another name or pass --overwrite"
                )
            shutil.rmtree(self.parts)
        for stale in self.output.parent.glob(f".{self.output.name}.*.tmp"):
            stale.unlink()  # left by a process that was killed while it joined
        try:
            self.parts.mkdir(exist_ok=True)
            with atomic_path(record, overwrite=True) as temporary:
                temporary.write_text(plan)
        except WeightspaceError:
            raise
        except OSError as error:
            raise OutputError(f"output: {self.parts} cannot be written ({error.strerror})") from None

    def _data_digest(self) -> str:
        """SHA-256 of the source's items, labels and official split."""
        digest, signals = hashlib.sha256(), self.signals
        for array in (signals.items, signals.labels, signals.official, *signals.attributes.values()):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _shards(self) -> Iterator[tuple[int, int, int]]:
        for number, first in enumerate(range(0, self.networks, self.recipe.shard)):
            yield number, first, min(first + self.recipe.shard, self.networks)

    def _shard_path(self, number: int) -> Path:
        return self.parts / f"shard-{number:05d}.h5"

    # -- the networks --------------------------------------------------------------------------------------

    def _fit(self, first: int, stop: int, bar: tqdm) -> Population:
        """Train networks ``first .. stop - 1``; the result depends on nothing else."""
        index = np.arange(first, stop)
        position, view = index // self.recipe.views, index % self.recipe.views
        targets = self.signals.values(self.items[position]).reshape(len(index), -1, self.channels)
        protocol = self.recipe.protocol
        before = bar.n
        result = fit_networks(
            self.net,
            self._initial(index, view),
            self.coordinates,
            targets,
            learning_rate=protocol.learning_rate,
            steps=protocol.steps,
            target_psnr=protocol.target_psnr,
            device=self.device,
            slots=None if self.device == "cpu" else min(1024, self.recipe.shard),
            progress=lambda done: bar.update(before + done - bar.n),
        )
        source = self.items[position]
        return Population(
            spec=self.spec,
            weights=_stored(result.parameters, self.recipe.dtype),
            network=np.arange(len(index), dtype=np.int64),
            step=result.steps.astype(np.int64),
            source=source.astype(np.int64),
            view=view.astype(np.int64),
            split=self.split[position],
            metrics={"psnr": result.psnr.astype(np.float32)},
            labels={name: values[source] for name, values in self.signals.named_labels.items()},
            architecture=architecture_of(self.net),
            protocol=self._protocol(),
            dtype=self.recipe.dtype,
        )

    def _initial(self, index: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Initial parameters, keyed by seed and network (independent) or seed and view (shared)."""
        keys = index if self.recipe.initialisation == "independent" else view
        uniform = np.empty((len(index), len(self.bounds)), dtype=np.float32)
        for row, key in enumerate(keys):
            generator = np.random.Generator(np.random.Philox(key=[self.recipe.seed, int(key)]))
            generator.random(out=uniform[row], dtype=np.float32)
        return (2.0 * uniform - 1.0) * self.bounds

    def _protocol(self) -> dict[str, Any]:
        return {
            **self.recipe.protocol.model_dump(mode="json"),
            "initialisation": self.recipe.initialisation,
            "activation": self.net.activation,
            "w0": self.net.w0,
            "w0_absorbed": False,
            "optimizer": "adam",
            "loss": "mean squared error on all samples",
            "coordinates": "row, column in [-1, 1], ends included, row-major",
        }

    def _source(self) -> Source:
        index = np.sort(self.items)
        return Source(self.signals.items[index], index)

    def _report(self, trained: int, seconds: float) -> GenerateReport:
        zoo = Zoo.open(self.output)
        psnr = zoo[POPULATION].metrics["psnr"]
        return GenerateReport(
            output=self.output,
            digest=zoo.digest,
            networks=zoo[POPULATION].networks,
            trained=trained,
            diverged=int(np.isnan(psnr).sum()),
            median_psnr=float(np.nanmedian(psnr)) if not np.isnan(psnr).all() else float("nan"),
            networks_per_second=trained / seconds if trained else 0.0,
            seconds=seconds,
        )


def _check_signals(recipe: Recipe, signals: Signals) -> None:
    """An INR needs coordinates: no tokens, no rows of a table."""
    if signals.vocabulary is not None or not signals.grid:
        what = "rows of a table" if signals.vocabulary is None else "tokens"
        raise RecipeError(
            f"recipe {recipe.name}: source: expected signals on a grid, to which INRs are fitted; {recipe.source.kind!r} "
            f"has {what}"
        )


def _selected_items(recipe: Recipe, signals: Signals) -> np.ndarray:
    available = len(signals.items)
    count = available if recipe.count is None else recipe.count
    if count > available:
        raise RecipeError(
            f"recipe {recipe.name}: count: the data set has {available} items, found {count}; "
            "raise views for more networks"
        )
    return np.random.default_rng([recipe.seed, available]).permutation(available)[:count]


def _split(recipe: Recipe, signals: Signals, items: np.ndarray) -> np.ndarray:
    """Split of each selected item, uint8."""
    config = recipe.split
    if config.method == "random":
        if config.val + config.test >= 1:
            raise RecipeError(f"recipe {recipe.name}: split: val and test leave nothing to train on")
        # another stream than the selection's, or the order of the items would be that of the splits
        stream = int(np.random.SeedSequence([recipe.seed, 1]).generate_state(1)[0])
        return split_items(items, (1 - config.val - config.test, config.val, config.test), stream)
    if signals.official is None:
        raise RecipeError(
            f"recipe {recipe.name}: split.method: the source {recipe.source.kind!r} has no official split"
        )
    split = signals.official[items].copy()
    training = split == 0
    if training.any():
        split[training] = split_items(items[training], (1 - config.val, config.val, 0.0), recipe.seed)
    return split


def _stored(parameters: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return torch.from_numpy(parameters).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return parameters.astype(dtype)


def _holds_files(folder: Path) -> bool:
    """Whether there is anything but the temporary files that a killed process leaves."""
    return not folder.is_dir() or any(entry.suffix != ".tmp" for entry in folder.iterdir())


def _is_sound(path: Path) -> bool:
    """Whether a shard is there and its checksum holds."""
    if not path.exists():
        return False
    try:
        verify_digest(path)
    except WeightspaceError:
        return False
    return True


def _difference(record: Path, plan: str) -> str:
    """The first field in which two plans differ, in words."""
    try:
        old, new = json.loads(record.read_bytes()), json.loads(plan)
    except ValueError:
        old = None
    if not isinstance(old, dict) or set(old) != set(new) or not isinstance(old["recipe"], dict):
        return "its recipe.json is damaged"
    old, new = ({**plan.pop("recipe"), **plan} for plan in (old, new))
    key = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
    if key == "data":
        return "the source's items differ"
    return f"{key}: {canonical_json(old.get(key))} there, {canonical_json(new.get(key))} now"
