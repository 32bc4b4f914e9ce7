"""The Small CNN Zoo: all checkpoints in one array, what is known of them in a CSV, the layout in another."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from weightspace.errors import DataError
from weightspace.zoo.transfer._designs import Design, activation_name, built
from weightspace.zoo.transfer._exporter import EXPORTERS, Exporter, Part
from weightspace.zoo.transfer._importer import BLOCK_BYTES, IMPORTERS, Block, Importer, ImportOptions
from weightspace.zoo.transfer._listing import Listing
from weightspace.zoo.transfer._tables import Table, read_table

WEIGHTS, LAYOUT, METRICS = "weights.npy", "layout.csv", ("metrics.csv", "metrics.csv.gz")
CONFIG = "config."


class SmallCNNOptions(ImportOptions):
    """What the tables do not say of the networks."""

    input_size: int = Field(32, ge=1, description="height and width of the images")
    stride: int = Field(2, ge=1, description="of every convolution")
    padding: int = Field(0, ge=0, description="of every convolution; Keras' layers do not pad")
    activation: str | None = Field(None, description="of all networks, for tables without config.activation")


@dataclass(frozen=True)
class _Variable:
    """One of TensorFlow's variables: where it stands in a row, and its shape."""

    name: str
    start: int
    shape: tuple[int, ...]

    def index(self) -> np.ndarray:
        """Its places in a row, in PyTorch's order of axes: (kh, kw, in, out) becomes (out, in, kh, kw)."""
        places = np.arange(self.start, self.start + int(np.prod(self.shape))).reshape(self.shape)
        return np.moveaxis(places, (-1, -2), (0, 1)).reshape(-1) if places.ndim > 1 else places


@IMPORTERS.register(
    "small-cnn-zoo",
    paper="Unterthiner et al. 2020, arXiv:2002.11448",
    expects="weights.npy, metrics.csv or metrics.csv.gz, and layout.csv",
)
class SmallCNNZoo(Importer):
    """CNNs with 4,970 parameters and nine checkpoints each; ReLU and tanh become two populations."""

    options_type = SmallCNNOptions

    def listing(self) -> Listing:
        """A row of the table for each row of the array."""
        for name in (WEIGHTS, LAYOUT):
            if not (self.source / name).is_file():
                raise DataError(f"source {self.source}: expected {self.expects}, found no {name}")
        self._weights = _mapped(self.source / WEIGHTS)
        self._variables = _variables(self.source / LAYOUT, self._weights.shape[1])
        self._gather = np.concatenate([variable.index() for variable in self._variables])
        path = next((self.source / name for name in METRICS if (self.source / name).is_file()), None)
        if path is None:
            raise DataError(f"source {self.source}: expected {self.expects}, found no metrics.csv")
        table = read_table(path)
        rows = len(next(iter(table.values())))
        if rows != len(self._weights):
            raise DataError(
                f"{path}: has {rows:,} rows, but {WEIGHTS} {len(self._weights):,}: expected one for each"
            )
        return self._listed(path, table, rows)

    def _listed(self, path: Path, table: Table, rows: int) -> Listing:
        models = table.pop("modeldir", None)
        if models is None:
            raise DataError(f"{path}: expected a column modeldir, found {', '.join(table)}")
        self._activations = self._activation_of(path, table, rows)
        steps = [_step(path, line, value) for line, value in enumerate(table.pop("step", ["0"] * rows), 2)]
        options = {
            name: table.pop(name) for name in list(table) if name.startswith(CONFIG) or name == "laststep"
        }
        return Listing(
            paths=[f"{WEIGHTS} row {row}" for row in range(rows)],
            network=models,
            step=steps,
            known_as=models,
            metrics={name: values for name, values in table.items() if name},
            hyperparameters={name.removeprefix(CONFIG): values for name, values in options.items()},
        )

    def _activation_of(self, path: Path, table: Table, rows: int) -> list[str]:
        given = table.get(f"{CONFIG}activation") or [self.options.activation] * rows
        names = {value: activation_name(value) for value in set(given)}
        unknown = next((value for value, name in names.items() if name is None), "")
        if unknown is None:
            raise DataError(f"{path}: expected a column {CONFIG}activation; or say --set activation=NAME")
        if unknown:
            raise DataError(f"{path}: {CONFIG}activation: no activation {unknown!r} is known")
        return [str(names[value]) for value in given]

    def file(self, listing: Listing, place: int) -> str | Path:
        """The array, for all."""
        return self.source / WEIGHTS

    def blocks(self, listing: Listing, start: int) -> Iterator[Block]:
        """Rows of the array, in our order of axes, by activation."""
        places = [int(path.rpartition(" ")[2]) for path in listing.paths]
        size = max(1, BLOCK_BYTES // (4 * len(self._gather)))
        for begin in range(start, len(places), size):
            at = places[begin : begin + size]
            block = np.asarray(self._weights[at], dtype=np.float32)[:, self._gather]
            names = [self._population(self._activations[place]) for place in at]
            told = np.array(names)
            yield Block(
                {name: block[told == name] for name in dict.fromkeys(names)},
                [{"population": n} for n in names],
            )

    def meet(self, listing: Listing, place: int) -> None:
        """Know the population of a row again."""
        self._population(self._activations[int(listing.paths[place].rpartition(" ")[2])])

    def _population(self, activation: str) -> str:
        name = f"cnn-{activation}"
        if name not in self.designs:
            self.designs[name] = self._design(activation)
        return name

    def _design(self, activation: str) -> Design:
        convolutions = [variable.shape for variable in self._variables if len(variable.shape) == 4]
        dense = [variable.shape for variable in self._variables if len(variable.shape) == 2]
        if len(dense) != 1 or not convolutions or len(self._variables) != 2 * (len(convolutions) + 1):
            raise DataError(
                f"{self.source / LAYOUT}: expected convolutions and one dense layer, each with a kernel and a bias"
            )
        options = self.options
        arguments: dict[str, Any] = {
            "input_shape": [convolutions[0][2], options.input_size, options.input_size],
            "channels": [shape[3] for shape in convolutions],
            "out_features": dense[0][1],
            "kernel_size": [shape[0] for shape in convolutions],
            "stride": options.stride,
            "padding": options.padding,
            "activation": activation,
            "pooling": "mean",
        }
        design = built({"kind": "cnn", "arguments": arguments}, {})
        shapes = [tensor.shape for tensor in design.spec.tensors.values()]
        if shapes != [_ours(variable.shape) for variable in self._variables]:
            raise DataError(
                f"{self.source / LAYOUT}: its shapes are not those of a CNN with the mean over pixels"
            )
        protocol = {
            "axes": "kernels as in PyTorch, (out, in, height, width); stored as (height, width, in, out)",
            "pooling": "mean over pixels, convolutions as the options say: the files hold shapes alone",
        }
        return Design(design.spec, design.tensors, design.architecture, protocol, f"cnn-{activation}")


def _ours(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[-1], shape[-2], *shape[:-2]) if len(shape) > 1 else shape


def _mapped(path: Path) -> np.ndarray:
    try:
        weights = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError) as error:
        reason = str(error)
        if "Python objects" in reason or "allow_pickle" in reason:
            reason = "it pickles objects, and nothing is unpickled here"
        elif "mmap length" in reason:
            reason = "the file is truncated"
        raise DataError(f"{path}: not a readable array ({reason})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(weights, np.ndarray):
        raise DataError(f"{path}: expected one array as np.save writes it, found an archive of several")
    if weights.ndim != 2 or weights.dtype.kind != "f":
        raise DataError(
            f"{path}: expected floats of shape (rows, parameters), found {weights.dtype} {list(weights.shape)}"
        )
    return weights


def _variables(path: Path, parameters: int) -> list[_Variable]:
    """In the order of a row: kernel and bias of every layer."""
    table = read_table(path)
    missing = next((name for name in ("varname", "start_idx", "end_idx", "shape") if name not in table), None)
    if missing is not None:
        raise DataError(f"{path}: expected a column {missing}, found {', '.join(table)}")
    variables = []
    end = 0
    for line, row in enumerate(
        zip(*(table[n] for n in ("varname", "start_idx", "end_idx", "shape")), strict=True), 2
    ):
        variable = _variable(path, line, *row)
        variables.append(variable)
    variables.sort(key=lambda variable: variable.start)
    for variable in variables:
        if variable.start != end:
            raise DataError(f"{path}: {variable.name}: expected to start at {end}, found {variable.start}")
        end += int(np.prod(variable.shape))
    if end != parameters:
        raise DataError(f"{path}: its variables have {end:,} numbers, but rows of {WEIGHTS} {parameters:,}")
    paired = _kernel_first(variables)
    left = next((variable.name for variable in variables if variable not in paired), None)
    if left is not None:
        raise DataError(f"{path}: {left}: expected kernels, and a bias in the scope of each")
    return paired


def _variable(path: Path, line: int, name: str, start: str, end: str, shape: str) -> _Variable:
    try:
        axes = ast.literal_eval(shape)
        sizes = tuple(int(size) for size in (axes if isinstance(axes, tuple | list) else (axes,)))
        first, last = int(float(start)), int(float(end))
    except (ValueError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError):
        raise DataError(
            f"{path}, line {line}: {name}: expected numbers and a shape such as (3, 3, 1, 16)"
        ) from None
    if last - first != int(np.prod(sizes)) or not sizes:
        raise DataError(f"{path}, line {line}: {name}: {shape} does not have {last - first} numbers")
    return _Variable(name, first, sizes)


def _kernel_first(variables: list[_Variable]) -> list[_Variable]:
    """Each kernel before its bias, wherever they stand in a row."""
    kernels = [variable for variable in variables if len(variable.shape) > 1]
    biases: Mapping[str, _Variable] = {v.name.rpartition("/")[0]: v for v in variables if len(v.shape) == 1}
    paired = []
    for kernel in kernels:
        bias = biases.get(kernel.name.rpartition("/")[0])
        paired += [kernel, bias] if bias is not None else [kernel]
    return paired


def _step(path: Path, line: int, value: Any) -> int:
    try:
        return int(float(value))
    except (ValueError, OverflowError):
        raise DataError(f"{path}, line {line}: step: expected a number, found {value!r}") from None


# -- and back ----------------------------------------------------------------------------------------------


@EXPORTERS.register("small-cnn-zoo", keeps=("metrics", "hyperparameters", "step", "splits"))
class SmallCNNZooExport(Exporter):
    """All weights in `weights.npy`, in TensorFlow's order of axes, with `metrics.csv`, `layout.csv`, `splits.json`."""

    def check(self) -> None:
        """CNNs of one shape, with the mean over pixels and one activation each."""
        shapes = set()
        for part in self.parts:
            architecture = part.population.architecture or {}
            arguments = architecture.get("arguments", {})
            plain_cnn = architecture.get("kind") == "cnn" and arguments["pooling"] == "mean"
            plain_cnn = plain_cnn and arguments["norm"] == "none" and max(arguments["residual"]) < 0
            if not plain_cnn or len(set(arguments["activation"])) > 1:
                raise self.refusal(
                    f"CNNs with the mean over pixels, one activation and neither norm nor shortcuts, and population "
                    f"{part.name} is of other networks"
                )
            shapes.add(tuple(tensor.shape for tensor in part.population.spec.tensors.values()))
        if len(shapes) > 1:
            raise self.refusal("networks of one shape; say --population NAME")

    def write(self, folder: Path) -> Iterator[None]:
        """The weights, row by row, and the tables."""
        spec = self.parts[0].population.spec
        rows = sum(len(part.rows) for part in self.parts)
        shape = (rows, spec.num_parameters)
        weights = np.lib.format.open_memmap(folder / WEIGHTS, "w+", np.float32, shape)
        table: list[dict[str, Any]] = []
        splits: dict[str, str] = {}
        for part in self.parts:
            for row, state in part.states():
                weights[len(table)] = np.concatenate([_theirs(tensor.numpy()) for tensor in state.values()])
                model = f"{part.name}/{part.population.network[row]:06d}"
                splits[model] = part.split_of(row)
                table.append({"modeldir": model, **_metrics_row(part, row)})
                yield
        weights.flush()
        _write_csv(folder / METRICS[0], table)
        _write_csv(folder / LAYOUT, _layout([(n, tensor.shape) for n, tensor in spec.tensors.items()]))
        self.write_splits(folder, [(model, split, None) for model, split in splits.items()])


def _theirs(tensor: np.ndarray) -> np.ndarray:
    """Flattened in TensorFlow's order of axes: (out, in, kh, kw) becomes (kh, kw, in, out)."""
    return (np.moveaxis(tensor, (0, 1), (-1, -2)) if tensor.ndim > 1 else tensor).reshape(-1)


def _metrics_row(part: Part, row: int) -> dict[str, Any]:
    architecture = part.population.architecture
    assert architecture is not None
    told = part.values("hyperparameters", row, decoded=True)
    last = {"laststep": told.pop("laststep")} if "laststep" in told else {}
    return {
        "step": part.population.step[row],
        **part.values("metrics", row),
        **last,
        **{f"{CONFIG}{name}": value for name, value in told.items()},
        f"{CONFIG}activation": architecture["arguments"]["activation"][0],
    }


def _layout(tensors: Sequence[tuple[str, tuple[int, ...]]]) -> list[dict[str, Any]]:
    found, start = [], 0
    for name, shape in tensors:
        layer, _, leaf = name.rpartition(".")
        theirs = (*shape[2:], shape[1], shape[0]) if len(shape) > 1 else shape
        end = start + int(np.prod(shape))
        variable = f"{layer}/{'kernel' if leaf == 'weight' else 'bias'}:0"
        found.append({"varname": variable, "start_idx": start, "end_idx": end, "shape": str(theirs)})
        start = end
    return found


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
