"""What a recipe will cost, before anything is made."""

from __future__ import annotations

import resource
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightspace.datagen._generate import gigabytes, resolve_recipe
from weightspace.datagen._recipe import Recipe
from weightspace.datagen._work import Outline, Work, zoo_bytes
from weightspace.devices import choose_device
from weightspace.errors import OutputError
from weightspace.zoo import Zoo

_JOIN_BYTES_PER_SECOND = 2e8  # of a slow disk; joining is seldom worth mentioning beside training
_JOIN_MEMORY = 2**26  # buffers, and the columns of a large zoo


@dataclass(frozen=True)
class Plan:
    """What a recipe makes and costs on this machine.

    Attributes:
        recipe: its name.
        device: on which the time was measured.
        networks: that are trained.
        rows: of the zoo: their checkpoints, and those of copies.
        populations: of the zoo.
        parameters: of a network: (min, median, max) over the populations.
        shards: the unit of resuming and of job arrays.
        networks_per_second: found by the probe.
        seconds: that generation takes.
        file_bytes: size of the zoo, at most.
        disk_bytes: room that generation takes while it joins the shards.
        memory_bytes: peak of the process.
        folder: where the zoo would be written.
        free_bytes: room there.
    """

    recipe: str
    device: str
    networks: int
    rows: int
    populations: int
    parameters: tuple[int, int, int]
    shards: int
    networks_per_second: float
    seconds: float
    file_bytes: int
    disk_bytes: int
    memory_bytes: int
    folder: Path
    free_bytes: int

    def __str__(self) -> str:
        """A table for people."""
        low, middle, high = self.parameters
        sizes = f"{low:,}" if low == high else f"{low:,} to {high:,}, median {middle:,}"
        rate = f"{self.networks_per_second:.3g} networks/s on {self.device}"
        lines = {
            "recipe": self.recipe,
            "networks": f"{self.networks:,} in {self.shards:,} shard{'s' * (self.shards > 1)}",
            "rows": f"{self.rows:,} in {self.populations:,} population{'s' * (self.populations > 1)}",
            "parameters": sizes,
            "time": f"about {_duration(self.seconds)}, {rate}",
            "memory": f"about {gigabytes(self.memory_bytes)}",
            "file": f"about {gigabytes(self.file_bytes)}",
            "disk": f"about {gigabytes(self.disk_bytes)} while shards are joined; "
            f"{gigabytes(self.free_bytes)} free in {self.folder}",
        }
        return "\n".join(f"{name:<10}  {text}" for name, text in lines.items())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan(
    recipe: str | Path | Recipe,
    output: str | Path | None = None,
    *,
    count: int | None = None,
    views: int | None = None,
    seed: int | None = None,
    data_root: str | Path | None = None,
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    seconds: float = 2.0,
) -> Plan:
    """What ``generate`` would make of a recipe, and what it would cost; the time follows from a short probe.

    The probe runs the recipe's own training on this machine; other work on it meanwhile makes the estimate longer.

    Args:
        recipe: a built-in name, the path of a YAML file, or a ``Recipe``.
        output: where the zoo would be written; the working directory by default.
        count: as in :func:`generate`.
        views: as in :func:`generate`.
        seed: as in :func:`generate`.
        data_root: folder with the source's files, for recipes that need some.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        overrides: any field of the recipe by its dotted name.
        seconds: to spend on the probe, beside what compilation takes.

    Raises:
        RecipeError: unknown recipe or field, or a count beyond the data set.
        DataError: source files are missing or damaged.
        OutputError: the directory of the output does not exist.
        DeviceError: ``"cuda"`` without CUDA.

    Example:
        >>> found = plan("digits-inr", count=10, overrides={"protocol.steps": 5}, seconds=0.1)
        >>> found.networks, found.populations, found.parameters, found.shards
        (10, 1, (1185, 1185, 1185), 1)
    """
    recipe = resolve_recipe(recipe, overrides, count=count, views=views, seed=seed)
    folder = Path(output).parent if output is not None else Path()
    if not folder.is_dir():
        raise OutputError(f"output: directory {folder} does not exist")
    device = choose_device(device)
    signals = recipe.source.load(Path(data_root) if data_root is not None else None)
    work = recipe.work(signals, device)
    rate = work.probe(seconds)
    outline = work.outline() or _outline_by_trial(work)
    size = zoo_bytes(outline, recipe.dtype, work.sources())
    parameters = [part.parameters for part in outline]
    return Plan(
        recipe=recipe.name,
        device=device,
        networks=work.networks,
        rows=sum(part.rows for part in outline),
        populations=len(outline),
        parameters=(min(parameters), int(statistics.median(parameters)), max(parameters)),
        shards=len(work.shards),
        networks_per_second=rate,
        seconds=work.networks / rate + size / _JOIN_BYTES_PER_SECOND,
        file_bytes=size,
        disk_bytes=2 * size,
        memory_bytes=_peak_memory() + max(_JOIN_MEMORY, *(work.memory(shard) for shard in work.shards)),
        folder=folder.resolve(),
        free_bytes=shutil.disk_usage(folder).free,
    )


def _outline_by_trial(work: Work) -> Sequence[Outline]:
    """The populations of one network per architecture, as often as there are networks of it."""
    found: dict[str, Outline] = {}
    firsts = {shard.architecture: shard for shard in reversed(work.shards)}
    for architecture, first in sorted(firsts.items()):
        made, zoo, _ = work.trial(first, 1)
        networks = sum(shard.networks for shard in work.shards if shard.architecture == architecture)
        found |= _scaled(zoo, networks // made)
    return list(found.values())


def _scaled(zoo: Zoo, times: int) -> dict[str, Outline]:
    return {
        name: Outline(
            name, population.networks * times, population.rows * times, population.spec.num_parameters
        )
        for name, population in zoo.populations.items()
    }


def _peak_memory() -> int:
    """Bytes that this process has had at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
