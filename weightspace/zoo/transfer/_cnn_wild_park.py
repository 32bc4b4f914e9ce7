"""CNN Wild Park: Ray's trial folders, with the description of each network beside its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from weightspace.errors import DataError
from weightspace.zoo.transfer._designs import Design, activation_name, built, chain, chain_design
from weightspace.zoo.transfer._exporter import EXPORTERS, Exporter, json_ready, save_state
from weightspace.zoo.transfer._importer import IMPORTERS, FileImporter, ImportOptions, Note, as_state
from weightspace.zoo.transfer._listing import Listing, Problem, walk
from weightspace.zoo.transfer._paths import PathIndex
from weightspace.zoo.transfer._splits import split_name
from weightspace.zoo.transfer._tables import Table, numbers, read_json

FILE = "checkpoint.pt"
_CHECKPOINT = re.compile(r"checkpoint_\d+")
_OTHERS = ("zoo.json", "experiment_state", "searcher-state")


class WildParkOptions(ImportOptions):
    """What the files do not say."""

    table: str | None = Field(
        None, description="the JSON list of path, score and step, if the folder has several"
    )
    input_size: int = Field(32, ge=1, description="height and width of the images")


@IMPORTERS.register(
    "cnn-wild-park",
    paper="Kofinas et al. 2024, arXiv:2403.12143",
    expects="trial folders with checkpoint.pt, and a JSON list of path, score and step",
)
class CNNWildPark(FileImporter):
    """CNNs of many architectures, each a population, with the scores of a JSON list."""

    options_type = WildParkOptions

    def listing(self) -> Listing:
        """The list's rows that have files, and the files' rows."""
        paths = [path for path in walk(self.source, (FILE,)) if path.rpartition("/")[2] == FILE]
        if not paths:
            raise self.nothing()
        file = json_list(self.source, self.options.table)
        table, split = _rows(file)
        index = PathIndex(paths)
        places: dict[int, int] = {}
        problems = []
        for row, listed in enumerate(table.pop("path")):
            place = index.find(str(listed), str(file))
            place = index.find(f"{listed}/{FILE}", str(file)) if place is None else place
            if place is None:
                problems.append(Problem(str(listed), f"listed in {file.name}, but there is no such file"))
            elif place in places:
                problems.append(Problem(str(listed), f"listed twice in {file.name}"))
            else:
                places[place] = row
        problems += [
            Problem(path, f"not listed in {file.name}") for at, path in enumerate(paths) if at not in places
        ]
        kept = [place for place in range(len(paths)) if place in places]
        rows = [places[place] for place in kept]
        steps = _steps(file, table.pop("step", None), rows)
        return Listing(
            paths=[paths[place] for place in kept],
            network=[network_folder(paths[place]) for place in kept],
            step=steps,
            split=None if split is None else [split[row] for row in rows],
            metrics={name: [column[row] for row in rows] for name, column in table.items()},
            problems=problems,
        )

    def read(self, path: str) -> tuple[Mapping[str, Tensor], Note]:
        """The state dict under ``model``, and the configuration beside it."""
        value = self.load(path)
        if (
            not isinstance(value, Mapping)
            or not isinstance(value.get("config"), Mapping)
            or "model" not in value
        ):
            raise DataError("expected a dictionary of 'model' and 'config'")
        config = value["config"]
        plain = bool | int | float | str
        told = {n: each for n, each in config.items() if isinstance(n, str) and isinstance(each, plain)}
        return as_state(value["model"]), {"hyperparameters": told, "_config": config}

    def kind(self, note: Note) -> Hashable:
        """What of the configuration is not in the shapes."""
        config = note["_config"]
        return json.dumps([_of(config, name) for name in _ARCHITECTURE], default=str)

    def design(self, shapes: Mapping[str, tuple[int, ...]], note: Note) -> Design:
        """A CNN, as its configuration says; one with an activation that we do not have is not built."""
        layers = chain(shapes)
        convolutions = [name for name in layers if len(shapes[f"{name}.weight"]) == 4]
        last = next((name for name in layers if len(shapes[f"{name}.weight"]) == 2), "")
        if not convolutions or len(layers) != len(convolutions) + 1 or not last:
            raise DataError("expected convolutions and one linear layer")
        sizes, linear = [shapes[f"{name}.weight"] for name in convolutions], shapes[f"{last}.weight"]
        config = note["_config"]
        given = _of(config, "activation")
        names = [activation_name(each) for each in _listed(given, len(sizes))]
        residual = _residual(_of(config, "residual"), len(sizes))
        if given is None or None in names:
            if any(source >= 0 for source in residual):
                raise DataError(f"config: activation: expected one that is known, found {given!r}")
            return _named(chain_design(shapes, [*convolutions, last]), {"activation": str(given)})
        arguments = {
            "input_shape": [sizes[0][1], self.options.input_size, self.options.input_size],
            "channels": [size[0] for size in sizes],
            "out_features": linear[0],
            "kernel_size": [size[2] for size in sizes],
            "stride": 1 if _of(config, "stride") is None else _of(config, "stride"),
            "padding": "same" if _of(config, "padding") is None else _of(config, "padding"),
            "activation": names,
            "residual": residual,
            "shortcut": "shared",
            "pooling": "mean" if linear[1] == sizes[-1][0] else "flatten",
            "dropout": 0.0,
        }
        named = {f"convolutions.{at}": name for at, name in enumerate(convolutions)}
        return _named(built({"kind": "cnn", "arguments": arguments}, {**named, "classifier": last}), {})

    def name_of(self, design: Design) -> str:
        """Numbered: every architecture is a population."""
        return f"cnn-{len(self.designs):03d}"


_ARCHITECTURE = ("activation", "residual", "stride", "padding")


def _named(design: Design, protocol: Mapping[str, Any]) -> Design:
    said = {"said_by": "the configuration in each file; shortcuts add the channels that both have"}
    return Design(
        design.spec, design.tensors, design.architecture, {**design.protocol, **said, **protocol}, "cnn"
    )


def _of(config: Mapping[str, Any], name: str) -> Any:
    """An entry of a configuration, however it is nested or whether its name is a plural."""
    inner = [
        config,
        *(config[key] for key in ("model", "model_config", "cnn") if isinstance(config.get(key), Mapping)),
    ]
    for each in inner:
        for key in (name, f"{name}s", f"{name}_size"):
            if key in each:
                return each[key]
    return None


def _listed(value: Any, layers: int) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * layers


def _residual(value: Any, layers: int) -> list[int]:
    """For each layer the earlier one that is added to it, -1 for none."""
    entries = _listed(value, layers)
    if len(entries) != layers:
        raise DataError(
            f"config: residual: expected {layers} entries, one for each layer, found {len(entries)}"
        )
    found = []
    for layer, entry in enumerate(entries):
        if entry is None or entry is False:
            found.append(-1)
        elif entry is True:
            found.append(layer - 1)
        elif isinstance(entry, int) and -1 <= entry < layer:
            found.append(entry)
        else:
            raise DataError(
                f"config: residual: expected an earlier layer or -1 for layer {layer}, found {entry!r}"
            )
    return found


def json_list(source: Path, given: str | None) -> Path:
    """The JSON beside the trial folders.

    Raises:
        DataError: none, or several.
    """
    if given is not None:
        if not (source / given).is_file():
            raise DataError(f"source {source}: table: found no {given}")
        return source / given
    found = [path for path in sorted(source.glob("*.json")) if not path.name.startswith(_OTHERS)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"source {source}: expected one JSON list of path, score and step, found {names}; say --set table=FILE"
        )
    return found[0]


def _rows(path: Path) -> tuple[Table, list[str | None] | None]:
    """The columns of the list, and the splits if it is divided."""
    document = read_json(path)
    splits = [split_name(key) for key in document] if isinstance(document, Mapping) else []
    if not splits or None in splits:
        return _columns(path, document), None
    if len(set(splits)) < len(splits):
        raise DataError(f"{path}: expected each split once, found {', '.join(document)}")
    table: Table = {}
    split: list[str | None] = []
    for name, part in zip(splits, document.values(), strict=True):
        columns = _columns(path, part)
        for key, values in columns.items():
            table.setdefault(key, [None] * len(split)).extend(values)
        split += [name] * len(columns["path"])
    return {key: values + [None] * (len(split) - len(values)) for key, values in table.items()}, split


def _columns(path: Path, document: Any) -> Table:
    if isinstance(document, list) and all(isinstance(row, dict) for row in document):
        names = dict.fromkeys(name for row in document for name in row)
        document = {name: [row.get(name) for row in document] for name in names}
    whole = isinstance(document, dict) and all(isinstance(column, list) for column in document.values())
    if not whole or "path" not in document or len({len(column) for column in document.values()}) != 1:
        raise DataError(f"{path}: expected a list of objects with path, score and step")
    return dict(document)


def _steps(path: Path, values: Sequence[Any] | None, rows: Sequence[int]) -> list[int] | None:
    if values is None:
        return None
    found = numbers([values[row] for row in rows])
    if found is None or found.dtype.kind != "i":
        raise DataError(f"{path}: step: expected whole numbers")
    return [int(step) for step in found]


def network_folder(path: str) -> str:
    """The folder of a trial, without that of the checkpoint.

    Example:
        >>> network_folder("trial_3/checkpoint_000012/checkpoint.pt"), network_folder("trial_3/checkpoint.pt")
        ('trial_3', 'trial_3')
    """
    return "/".join(_without_checkpoint(path.split("/")[:-1]))


def _without_checkpoint(parts: Sequence[str]) -> Iterator[str]:
    return (part for part in parts if not _CHECKPOINT.fullmatch(part))


# -- and back ----------------------------------------------------------------------------------------------


@EXPORTERS.register("cnn-wild-park", keeps=("metrics", "hyperparameters", "step", "splits"))
class CNNWildParkExport(Exporter):
    """A folder per network with `checkpoint.pt` for each step, and `splits.json` with path, step and metrics."""

    def check(self) -> None:
        """CNNs without norm, whose shortcuts add the channels that both have."""
        for part in self.parts:
            architecture = part.population.architecture or {}
            arguments = architecture.get("arguments", {})
            fits = architecture.get("kind") == "cnn" and arguments["norm"] == "none"
            fits = fits and arguments["pooling"] in ("mean", "flatten")
            if not fits or (max(arguments["residual"]) >= 0 and arguments["shortcut"] != "shared"):
                raise self.refusal(
                    "CNNs without norm, with the mean over pixels or none, and population "
                    f"{part.name} is of other networks"
                )
        self.check_steps()

    def write(self, folder: Path) -> Iterator[None]:
        """The weights, each with its configuration, and after them the list."""
        lists: dict[str, list[dict[str, Any]]] = {}
        for part in self.parts:
            architecture = part.population.architecture
            assert architecture is not None
            built_as = {name: architecture["arguments"][name] for name in _ARCHITECTURE}
            layers = len(architecture["arguments"]["channels"])
            for row, state in part.states():
                network, step = part.population.network[row], int(part.population.step[row])
                path = f"{part.name}_{network:06d}/checkpoint_{step:06d}/{FILE}"
                config = {**part.values("hyperparameters", row, decoded=True), **built_as}
                model = {_theirs(name, layers): tensor.clone() for name, tensor in state.items()}
                save_state(folder / path, {"model": model, "config": config})
                entry = {"path": path, "step": step, **json_ready(part.values("metrics", row))}
                lists.setdefault(part.split_of(row), []).append(entry)
                yield
        (folder / "splits.json").write_text(json.dumps(lists, indent=1))


def _theirs(name: str, layers: int) -> str:
    """Layers by their numbers, the classifier last."""
    return name.replace("convolutions.", "layers.", 1).replace("classifier.", f"layers.{layers}.", 1)
