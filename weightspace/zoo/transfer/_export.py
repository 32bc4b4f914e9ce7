"""From a zoo to any layout: validate, write beside, rename. Formats say only what they look like."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

from weightspace.errors import ConfigError, OutputError
from weightspace.zoo._where import rows_where
from weightspace.zoo._zoo import Zoo
from weightspace.zoo.transfer._exporter import EXPORTERS, Exporter, Part
from weightspace.zoo.transfer._folder import DESCRIPTION


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Attributes:
        output: the folder.
        format: of the folder.
        populations: names and numbers of networks.
        networks: that were written.
        rows: that were written, one for each checkpoint.
        left_out: what the zoo has and the layout has no place for.
        seconds: that this call took.
    """

    output: Path
    format: str
    populations: dict[str, int]
    networks: int
    rows: int
    left_out: list[str]
    seconds: float


def export_zoo(
    zoo: Zoo | str | Path,
    format: str,
    destination: str | Path,
    *,
    population: str | None = None,
    where: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Write networks of a zoo in another layout, into a new folder that appears when it is complete.

    Args:
        zoo: a zoo, or its path.
        format: a name in ``EXPORTERS``.
        destination: the folder to make.
        population: which one; all by default.
        where: only rows for which this holds, see :func:`weightspace.zoo.rows_where`.
        overwrite: replace a folder that an export made.
        progress: show a bar on standard error.

    Raises:
        ConfigError: an unknown format, or networks that it has no place for.
        ZooError: the zoo cannot be opened, or has no such population.
        OutputError: the folder exists, or cannot be written.
    """
    begun = time.perf_counter()
    if format not in EXPORTERS:
        raise ConfigError(f"format: expected one of {', '.join(EXPORTERS)}, found {format!r}")
    opened = zoo if isinstance(zoo, Zoo) else Zoo.open(zoo)
    parts = _parts(opened, population, where)
    _check_parts(parts)
    exporter, output = EXPORTERS[format](parts), Path(destination)
    exporter.check()
    with _new_folder(output, overwrite=overwrite) as folder:
        rows = sum(len(part.rows) for part in parts)
        for _ in tqdm(
            exporter.write(folder),
            total=rows,
            unit=" networks",
            desc="export",
            file=sys.stderr,
            disable=not progress,
        ):
            pass
        (folder / DESCRIPTION).write_text(json.dumps(_description(opened, exporter, parts)))
    populations = {part.name: len(np.unique(part.networks)) for part in parts}
    left_out = exporter.left_out() + [f"sources/{name}" for name in opened.sources]
    seconds = time.perf_counter() - begun
    return ExportReport(output, format, populations, sum(populations.values()), rows, left_out, seconds)


def _parts(zoo: Zoo, name: str | None, where: str | None) -> list[Part]:
    names = list(zoo) if name is None else [name]
    found = []
    for each in names:
        population = zoo[each]
        rows = np.arange(population.rows)
        if where is not None:
            rows = rows_where(population, where, required=len(names) == 1)
        if len(rows):
            found.append(Part(each, population, rows))
    if not found:
        raise ConfigError(f"where: {where!r} holds for no row of any population")
    return found


def _check_parts(parts: Sequence[Part]) -> None:
    """Raise ConfigError where names of files would lead elsewhere."""
    for part in parts:
        if not part.name or "/" in part.name or part.name in (".", ".."):
            raise ConfigError(
                f"export: expected a population whose name can be that of a folder, found {part.name!r}"
            )


def _description(zoo: Zoo, exporter: Exporter, parts: Sequence[Part]) -> dict[str, Any]:
    """What the layout does not say of the networks."""
    return {
        "exported_from": zoo.digest,
        "format": exporter.format,
        "populations": {
            part.name: {
                "spec": json.loads(part.population.spec.to_json(provenance=False)),
                "architecture": part.population.architecture,
                "protocol": part.population.protocol,
            }
            for part in parts
        },
    }


@contextmanager
def _new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``path`` that gets its name when the block ends well."""
    _check_folder(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    replaced = temporary.with_suffix(".old.tmp")
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(replaced)
        try:
            temporary.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
    except (OSError, SafetensorError) as error:  # the latter of a full disk
        raise OutputError(f"output: {path} could not be written ({_reason(error)})") from error
    finally:
        for left in (temporary, replaced):
            shutil.rmtree(left, ignore_errors=True)


def _check_folder(path: Path, *, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"output: directory {path.parent} does not exist")
    if path.exists() and not overwrite:
        raise OutputError(f"output: {path} exists already; choose another name or pass --overwrite")
    if path.exists() and not _is_export(path):
        reason = (
            f"its {DESCRIPTION} is of something else"
            if (path / DESCRIPTION).is_file()
            else f"it has no {DESCRIPTION}"
        )
        raise OutputError(f"output: {path} was not made by an export ({reason}); move it away")


def _is_export(path: Path) -> bool:
    """Whether an export described itself there: other programs may call a file so, too."""
    try:
        document = json.loads((path / DESCRIPTION).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"exported_from", "format", "populations"} <= set(document)


def _reason(error: Exception) -> str:
    told = re.search(r"os error (\d+)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)
