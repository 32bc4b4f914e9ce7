"""Any folder of state dicts, with a table of what is known of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from weightspace.errors import DataError, SpecError
from weightspace.spec import WeightSpec
from weightspace.zoo._files import canonical_json
from weightspace.zoo.transfer._designs import Design, activation_name, built, fixed_design, mlp_design
from weightspace.zoo.transfer._exporter import EXPORTERS, Exporter, Part
from weightspace.zoo.transfer._importer import IMPORTERS, FileImporter, ImportOptions, Note, as_state
from weightspace.zoo.transfer._listing import Listing, Problem, walk
from weightspace.zoo.transfer._paths import PathIndex
from weightspace.zoo.transfer._splits import split_name
from weightspace.zoo.transfer._state_files import SAFE, SUFFIXES, read_tensors
from weightspace.zoo.transfer._tables import Table, is_whole, numbers, read_json, read_table

DESCRIPTION = "zoo.json"
TABLE_NAMES = (".csv", ".csv.gz", ".json")
PATH_NAMES = ("path", "file", "filename", "name")
KINDS = ("labels", "metrics", "hyperparameters")


class FolderOptions(ImportOptions):
    """What is in the table, and what the files do not say of the networks."""

    table: str | None = Field(None, description="the CSV or JSON of labels, if the folder has several")
    labels: tuple[str, ...] = Field(
        (), description="columns that are labels; by default whole numbers and texts"
    )
    metrics: tuple[str, ...] = Field((), description="columns that are metrics; by default other numbers")
    hyperparameters: tuple[str, ...] = Field((), description="columns that are hyperparameters")
    architecture: dict[str, Any] | None = Field(
        None, description="kind and arguments of one of our networks, whose tensors are called as in ours"
    )
    activation: str | None = Field(None, description="of MLPs, whatever their tensors are called")
    w0: float = Field(1.0, gt=0, description="frequency of a sine or Gaussian")
    output_offset: float = Field(0.0, description="constant that is added to the output")
    population: str = Field("networks", description="its name in the zoo, for tables without that column")


@IMPORTERS.register(
    "folder", expects="state dicts (*.safetensors, *.pt, *.pth), and one CSV or JSON of labels"
)
class Folder(FileImporter):
    """State dicts or safetensors, one per checkpoint, with a CSV or JSON of labels, metrics and splits."""

    options_type = FolderOptions

    def listing(self) -> Listing:
        """The files, and the rows of the table that are theirs."""
        paths = walk(self.source, SUFFIXES)
        self._population: dict[str, str] = {}
        self._described = _descriptions(self.source / DESCRIPTION)
        file = self._table_file()
        if file is None or not paths:
            return Listing(paths)
        table = read_table(file)
        key = next((name for name in PATH_NAMES if name in table), None)
        if key is None:
            raise DataError(
                f"{file}: expected a column {' or '.join(PATH_NAMES)}, found {', '.join(table) or 'none'}"
            )
        rows, problems = _matched(paths, table.pop(key), file)
        kept = [path for at, path in enumerate(paths) if at in rows]
        order = [rows[at] for at in range(len(paths)) if at in rows]
        columns = {name: [column[row] for row in order] for name, column in table.items()}
        return self._listed(file, kept, columns, problems)

    def _table_file(self) -> Path | None:
        if self.options.table is not None:
            if not (self.source / self.options.table).is_file():
                raise DataError(f"source {self.source}: table: found no {self.options.table}")
            return self.source / self.options.table
        found = [path for path in sorted(self.source.iterdir()) if path.name.endswith(TABLE_NAMES)]
        found = [path for path in found if path.name != DESCRIPTION and not path.name.startswith(".")]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(
                f"source {self.source}: expected one CSV or JSON, found {names}; say --set table=FILE"
            )
        return found[0] if found else None

    def _listed(self, file: Path, paths: list[str], table: Table, problems: list[Problem]) -> Listing:
        population = [str(name) for name in table.pop("population", [])] or None
        network, split = table.pop("network", None), table.pop("split", None)
        if population is not None:
            self._population = dict(zip(paths, population, strict=True))
            network = None if network is None else list(zip(population, network, strict=True))
        item = table.pop("item", table.pop("source", None))
        found = Listing(
            paths,
            network=None if network is None else [json.dumps(key) for key in network],
            item=None if item is None else _numbered(item),
            view=_integers(file, "view", table.pop("view", None)),
            step=_integers(file, "step", table.pop("step", None)),
            split=None if split is None else [_split(file, value) for value in split],
            population=population,
            problems=problems,
        )
        for name, values in table.items():
            kind, column = self._kind(name, values)
            getattr(found, kind)[column] = values
        return found

    def _kind(self, name: str, values: Sequence[Any]) -> tuple[str, str]:
        """The table that a column belongs to, and what it is called there."""
        for kind in KINDS:
            if name.startswith(f"{kind}."):
                return kind, name.removeprefix(f"{kind}.")
            if name in getattr(self.options, kind):
                return kind, name
        array = numbers(values)
        is_metric = array is not None and (np.isnan(array).all() or not is_whole(values))
        return ("metrics" if is_metric else "labels"), name

    def read(self, path: str) -> tuple[Mapping[str, Tensor], Note]:
        """The tensors; of safetensors also the architecture in the metadata."""
        population = self._population.get(path, self.options.population)
        if not path.endswith(SAFE):
            return as_state(self.load(path)), {"_population": population, "_architecture": None}
        tensors, metadata = read_tensors(self.source / path)
        return tensors, {"_population": population, "_architecture": metadata.get("architecture")}

    def kind(self, note: Note) -> Hashable:
        """The population that the table names, and the architecture that the file does."""
        return note["_population"], note["_architecture"]

    def design(self, shapes: Mapping[str, tuple[int, ...]], note: Note) -> Design:
        """As the folder's description, the file, or the options say; else no symmetry is claimed."""
        name = note["_population"]
        if name in self._described:
            return self._described[name]
        design = self._built(shapes, note["_architecture"])
        return Design(design.spec, design.tensors, design.architecture, design.protocol, name)

    def _built(self, shapes: Mapping[str, tuple[int, ...]], stored: str | None) -> Design:
        architecture = self.options.architecture or (None if stored is None else _architecture(stored))
        if architecture is not None:
            return built(architecture, {})
        if self.options.activation is None:
            return fixed_design(shapes)
        activation = activation_name(self.options.activation) or self.options.activation
        design = mlp_design(shapes, activation, self.options.w0, self.options.output_offset)
        protocol = {"activation": activation, "said_by": "the options of the import"}
        return Design(design.spec, design.tensors, design.architecture, protocol)


def _matched(paths: list[str], listed: Sequence[Any], file: Path) -> tuple[dict[int, int], list[Problem]]:
    """The row of each path; and rows without files, files without rows, and paths that stand there twice."""
    index = PathIndex(paths)
    rows: dict[int, int] = {}
    problems = []
    for row, name in enumerate(listed):
        place = index.find(str(name), str(file))
        if place is None:
            problems.append(Problem(str(name), f"listed in {file.name}, but there is no such file"))
        elif place in rows:
            problems.append(Problem(str(name), f"listed twice in {file.name}"))
        else:
            rows[place] = row
    return rows, problems + [
        Problem(path, f"not listed in {file.name}") for at, path in enumerate(paths) if at not in rows
    ]


def _integers(file: Path, name: str, values: Sequence[Any] | None) -> list[int] | None:
    if values is None:
        return None
    found = numbers(values)
    if found is None or found.dtype.kind != "i":
        raise DataError(f"{file}: {name}: expected whole numbers")
    return [int(value) for value in found]


def _numbered(values: Sequence[Any]) -> list[int]:
    """Item numbers; names get numbers in the order in which they come."""
    found = numbers(values)
    if found is not None and found.dtype.kind == "i":
        return [int(value) for value in found]
    places: dict[str, int] = {}
    return [places.setdefault(str(value), len(places)) for value in values]


def _split(file: Path, value: Any) -> str:
    name = split_name(value)
    if name is None:
        raise DataError(f"{file}: split: expected one of train, val, test, found {value!r}")
    return name


def _architecture(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError("the architecture in its metadata is no JSON object")
    return found


def _descriptions(path: Path) -> dict[str, Design]:
    """The populations that an export describes, by name."""
    if not path.is_file():
        return {}
    document = read_json(path)
    try:
        return {name: _described(name, entry) for name, entry in document["populations"].items()}
    except (KeyError, TypeError, AttributeError, SpecError) as error:
        raise DataError(f"{path}: not a description that `weightspace export` wrote ({error})") from None


def _described(name: str, entry: Mapping[str, Any]) -> Design:
    spec = WeightSpec.from_json(json.dumps(entry["spec"]))
    return Design(spec, tuple(spec.tensors), entry["architecture"], entry["protocol"], name)


# -- and back ----------------------------------------------------------------------------------------------


@EXPORTERS.register("folder", keeps=("labels", "metrics", "hyperparameters", "step", "splits"))
class FolderExport(Exporter):
    """Safetensors, one per checkpoint and a folder per population, with `labels.csv`."""

    def write(self, folder: Path) -> Iterator[None]:
        """The weights, and after them the table."""
        rows: list[dict[str, Any]] = []
        for part in self.parts:
            below = folder / part.name
            below.mkdir()
            architecture = part.population.architecture
            metadata = {"architecture": canonical_json(architecture)} if architecture else None
            for row, state in part.states():
                path = below / f"{row:07d}{SAFE}"
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
                rows.append({"path": f"{part.name}/{path.name}", **_table_row(part, row)})
                yield
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = csv.DictWriter(file, names, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def _table_row(part: Part, row: int) -> dict[str, Any]:
    population = part.population
    network = population.network[row]
    found = {
        "population": part.name,
        "network": network,
        "item": population.source[network],
        "view": population.view[network],
        "step": population.step[row],
        "split": part.split_of(row),
    }
    return {**found, **{f"{k}.{name}": value for k in KINDS for name, value in part.values(k, row).items()}}
