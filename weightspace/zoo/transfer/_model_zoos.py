"""ModelZoos: a folder per network, with its parameters, its results per epoch, and its checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from weightspace.errors import DataError
from weightspace.zoo._zoo import Population
from weightspace.zoo.transfer._designs import Design, activation_name, chain_design, fixed_design, mlp_design
from weightspace.zoo.transfer._exporter import EXPORTERS, Exporter, Part, json_ready, save_state
from weightspace.zoo.transfer._importer import IMPORTERS, FileImporter, Note, as_state
from weightspace.zoo.transfer._listing import Listing, Problem, walk
from weightspace.zoo.transfer._tables import read_json

PARAMETERS, RESULTS, CHECKPOINTS = "params.json", "result.json", "checkpoints"
EPOCH = "training_iteration"
_PLACE = re.compile(r"^(?P<network>.*)/checkpoint_(?P<epoch>\d+)/checkpoints$")
_CHAIN = re.compile(r"(?:.*\.)?module_list\.\d+\.(?:weight|bias)")
# what Ray writes of itself
_BOOKKEEPING = {
    EPOCH,
    "timestamp",
    "pid",
    "date",
    "done",
    "trial_id",
    "experiment_id",
    "experiment_tag",
    "hostname",
}
_PREFIXES = ("time_", "timesteps_", "episodes_", "iterations_since", "node_ip", "warmup_time", "config")


@IMPORTERS.register(
    "modelzoos",
    paper="Schürholt et al. 2022, arXiv:2209.14764",
    expects="folders with params.json, result.json and checkpoint_0000NN/checkpoints",
)
class ModelZoos(FileImporter):
    """Networks with a checkpoint per epoch; the preprocessed `.pt` files are refused, as they pickle a class."""

    step_unit = "epochs"

    def check_source(self) -> None:
        """Also tells who points at a preprocessed file."""
        if self.source.is_file() and self.source.suffix in (".pt", ".pth"):
            raise DataError(
                f"source {self.source}: a preprocessed data set pickles objects of its authors' classes, and nothing is "
                f"unpickled here: that would run code; import the zoo's folder with {self.expects} instead"
            )
        super().check_source()

    def listing(self) -> Listing:
        """Checkpoints, with the line of their epoch."""
        files = walk(self.source, (PARAMETERS, RESULTS, CHECKPOINTS))
        present = set(files)
        found = []
        problems = []
        for path in files:
            match = _PLACE.match(f"/{path}")
            if match is None:
                continue
            network, epoch = match["network"][1:], int(match["epoch"])
            if _below(network, PARAMETERS) in present:
                found.append((path, network, epoch))
            else:
                problems.append(Problem(path, f"no {PARAMETERS} in the folder of its network"))
        if not found and not problems:
            self._explain()
        trained = {network for _, network, _ in found}
        for path in files:
            folder, _, name = path.rpartition("/")
            if name == PARAMETERS and folder not in trained:
                problems.append(Problem(path, "no checkpoints beside it"))
        return self._listed(found, present, problems)

    def _listed(
        self, found: Sequence[tuple[str, str, int]], present: set[str], problems: list[Problem]
    ) -> Listing:
        networks = dict.fromkeys(network for _, network, _ in found)
        self._parameters = {network: self._parameters_of(network) for network in networks}
        results = {network: self._results_of(network, present) for network in networks}
        rows = [(self._parameters[network], results[network].get(epoch, {})) for _, network, epoch in found]
        parameters = dict.fromkeys(name for told in self._parameters.values() for name in told)
        metrics = dict.fromkeys(n for lines in results.values() for line in lines.values() for n in line)
        names = [network for _, network, _ in found]
        return Listing(
            paths=[path for path, _, _ in found],
            network=names,
            step=[epoch for *_, epoch in found],
            known_as=names,
            metrics={name: [line.get(name) for _, line in rows] for name in metrics},
            hyperparameters={name: [told.get(name) for told, _ in rows] for name in parameters},
            problems=problems,
        )

    def _parameters_of(self, network: str) -> dict[str, Any]:
        path = self.source / _below(network, PARAMETERS)
        parameters = read_json(path)
        if not isinstance(parameters, dict):
            raise DataError(f"{path}: expected a JSON object")
        return {n: v for n, v in parameters.items() if isinstance(v, bool | int | float | str) or v is None}

    def _results_of(self, network: str, present: set[str]) -> dict[int, dict[str, Any]]:
        """Metrics by epoch."""
        path = _below(network, RESULTS)
        return _results(self.source / path) if path in present else {}

    def _explain(self) -> None:
        preprocessed = [path for path in walk(self.source, (".pt", ".pth")) if "/" not in path]
        if preprocessed:
            raise DataError(
                f"source {self.source}: expected {self.expects}, found {preprocessed[0]}; preprocessed data sets pickle "
                "objects of their authors' classes, and nothing is unpickled here: that would run code"
            )

    def read(self, path: str) -> tuple[Mapping[str, Tensor], Note]:
        """The state dict, and the activation that the parameters name."""
        match = _PLACE.match(f"/{path}")
        assert match is not None
        parameters = self._parameters[match["network"][1:]]
        named = [v for n, v in parameters.items() if "nlin" in n or "activation" in n or "nonlinearity" in n]
        return as_state(self.load(path)), {"_activation": activation_name(named[0]) if named else None}

    def kind(self, note: Note) -> Hashable:
        """The activation, which decides what an MLP's symmetries are."""
        return note["_activation"]

    def design(self, shapes: Mapping[str, tuple[int, ...]], note: Note) -> Design:
        """An MLP is built; a chain of convolutions has a spec; of others nothing is known to move."""
        is_chain = all(_CHAIN.fullmatch(name) for name in shapes)
        if is_chain and note["_activation"] and all(len(shape) <= 2 for shape in shapes.values()):
            design = mlp_design(shapes, note["_activation"], 1.0, 0.0)
            return Design(design.spec, design.tensors, design.architecture, {}, f"mlp-{note['_activation']}")
        design = chain_design(shapes) if is_chain else fixed_design(shapes)
        return Design(design.spec, design.tensors, None, design.protocol, "cnn" if is_chain else "networks")

    def name_of(self, design: Design) -> str:
        """Numbered where another architecture has the name."""
        return design.name if design.name not in self.designs else f"{design.name}-{len(self.designs):03d}"


def _below(network: str, name: str) -> str:
    return f"{network}/{name}" if network else name


def _results(path: Path) -> dict[int, dict[str, Any]]:
    """Metrics by epoch; the last line of an epoch counts."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            epoch = int(line[EPOCH])
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}, line {number}: expected a JSON object with {EPOCH}") from None
        found[epoch] = {name: value for name, value in line.items() if _is_metric(name, value)}
    return found


def _is_metric(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and name not in _BOOKKEEPING and not name.startswith(_PREFIXES)


# -- and back ----------------------------------------------------------------------------------------------


@EXPORTERS.register("modelzoos", keeps=("metrics", "hyperparameters", "step", "splits"))
class ModelZoosExport(Exporter):
    """A folder per network with parameters, results and a checkpoint per step, and `splits.json`."""

    def check(self) -> None:
        """Chains of layers: the layout has no place for shortcuts, and shapes alone would claim too much."""
        for part in self.parts:
            if not _is_chain(part.population):
                raise self.refusal(
                    f"MLPs and CNNs without norm and shortcuts, and population {part.name} is of other networks"
                )
        self.check_steps()

    def write(self, folder: Path) -> Iterator[None]:
        """The weights, with what is known of each network beside them."""
        splits: dict[str, str] = {}
        for part in self.parts:
            layers = list(dict.fromkeys(name.rpartition(".")[0] for name in part.population.spec.tensors))
            for row, state in part.states():
                network = f"{part.name}_{part.population.network[row]:06d}"
                step = int(part.population.step[row])
                path = folder / network / f"checkpoint_{step:06d}" / CHECKPOINTS
                save_state(path, {_theirs(name, layers): tensor.clone() for name, tensor in state.items()})
                if network not in splits:
                    (folder / network / PARAMETERS).write_text(json.dumps(_parameters(part, row)))
                splits[network] = part.split_of(row)
                with (folder / network / RESULTS).open("a") as file:
                    line = {EPOCH: step, **json_ready(part.values("metrics", row))}
                    file.write(json.dumps(line) + "\n")
                yield
        self.write_splits(folder, [(network, split, None) for network, split in splits.items()])


def _is_chain(population: Population) -> bool:
    architecture = population.architecture
    if architecture is None:
        return all(_CHAIN.fullmatch(name) for name in population.spec.tensors)
    arguments = architecture["arguments"]
    is_plain = (
        architecture["kind"] == "cnn" and arguments["norm"] == "none" and max(arguments["residual"]) < 0
    )
    return is_plain or architecture["kind"] == "mlp"


def _theirs(name: str, layers: Sequence[str]) -> str:
    layer, _, leaf = name.rpartition(".")
    return f"module_list.{layers.index(layer)}.{leaf}"


def _parameters(part: Part, row: int) -> dict[str, Any]:
    arguments = (part.population.architecture or {}).get("arguments", {})
    activation = arguments.get("activation")
    named = {"model::nlin": activation} if isinstance(activation, str) else {}
    return {**named, **json_ready(part.values("hyperparameters", row, decoded=True))}
