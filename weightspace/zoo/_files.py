"""Zoo files: write atomically, validate, map, digest. FORMAT.md is the contract."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from weightspace.errors import OutputError, SpecError, WeightspaceError, ZooError
from weightspace.spec import WeightSpec
from weightspace.zoo._zoo import SPLITS, Population, Source, Zoo

FORMAT = "weightspace-zoo"
FORMAT_VERSION = 1
STORAGE = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
PER_ROW = {"network": "<i8", "step": "<i8"}
PER_NETWORK = {"source": "<i8", "view": "<i8", "split": "|u1"}
TABLES = ("hyperparameters", "labels", "metrics")
BLOCK_ROWS = 4096


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


# -- writing -----------------------------------------------------------------------------------------------


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError when ``path`` exists and may not be overwritten, or its directory is missing."""
    if path.exists() and not overwrite:
        raise OutputError(f"output: {path} exists already; choose another name or pass --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"output: directory {path.parent} does not exist")


@contextmanager
def atomic_path(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary path beside ``path`` that is flushed and renamed to it when the block ends well.

    Raises:
        OutputError: ``path`` exists and may not be overwritten, or cannot be written (full disk, no
            directory, no permission).
    """
    check_output(path, overwrite=overwrite)
    # processes on two machines, or in two containers, may have the same number
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except WeightspaceError:
        raise
    except (
        OSError,
        RuntimeError,
    ) as error:  # h5py raises RuntimeError when a full disk keeps it from closing
        raise OutputError(f"output: {path} could not be written ({_reason(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What the system said: HDF5 reports the failure of a write in a text, or only as the cause of another error."""
    cause: BaseException | None = error
    while cause is not None:
        told = re.search(r"errno = (\d+)", str(cause))
        number = int(told[1]) if told else getattr(cause, "errno", None)
        if number:
            return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[h5py.File]:
    """An HDF5 file that appears under its name when the block ends well; see :func:`atomic_path`."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                yield file
        except RuntimeError as error:  # what h5py makes of a full disk when the file is closed
            raise OSError(str(error)) from error


def write_zoo(zoo: Zoo, path: Path, *, overwrite: bool = False) -> Path:
    """Write a zoo atomically; see ``Zoo.save``."""
    if not zoo.populations:
        raise ZooError("zoo: expected at least one population, found none")
    for name, population in zoo.populations.items():
        _check_name("/populations", name)
        check_population(f"/populations/{name}", population)
    with new_file(path, overwrite=overwrite) as file:
        write_header(file, zoo.recipe, content_digest(zoo))
        for name, population in zoo.populations.items():
            weights = write_population(file.create_group(f"populations/{name}"), population)
            for start in range(0, population.rows, BLOCK_ROWS):
                weights[start : start + BLOCK_ROWS] = population.weights[start : start + BLOCK_ROWS]
            weights.flush()
        write_sources(file, zoo.sources)
    return path


def write_header(file: h5py.File, recipe: Mapping[str, Any] | None, digest: str) -> None:
    """What the file says of itself."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    try:
        versions["weightspace"] = version("weightspace")
    except PackageNotFoundError:  # used from a source tree that was not installed
        versions["weightspace"] = "unknown"
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["digest"] = digest
    file.attrs["recipe"] = canonical_json(recipe)
    file.attrs["created_by"] = canonical_json(versions)


def write_population(group: h5py.Group, population: Population) -> h5py.Dataset:
    """All of a population but its weights; returns the dataset for those, whose place in the file is fixed."""
    group.attrs["spec"] = population.spec.to_json(provenance=False)
    group.attrs["architecture"] = canonical_json(population.architecture)
    group.attrs["protocol"] = canonical_json(population.protocol)
    group.attrs["weights_dtype"] = population.dtype
    weights = _contiguous_dataset(
        group,
        "weights",
        (len(population.network), population.spec.num_parameters),
        STORAGE[population.dtype],
    )
    for name, dtype in {**PER_ROW, **PER_NETWORK}.items():
        _write_array(group, name, np.asarray(getattr(population, name), dtype=dtype))
    for table in TABLES:
        columns = group.create_group(table)
        for name, values in getattr(population, table).items():
            _write_array(columns, name, _little_endian(values))
    return weights


def _write_array(group: h5py.Group, name: str, values: np.ndarray, **options: Any) -> None:
    dataset = group.create_dataset(name, data=values, **options)
    dataset.flush()  # small arrays wait in a buffer, and what goes wrong when h5py closes a dataset is ignored


def _contiguous_dataset(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: str) -> h5py.Dataset:
    """A dataset that has its place at once, and is not filled with zeros first."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), kind, space, properties))


def write_sources(file: h5py.File, sources: Mapping[str, Source]) -> None:
    """The signals."""
    for name, source in sources.items():
        group = file.create_group(f"sources/{name}")
        _write_array(group, "items", _little_endian(source.items), compression="gzip", compression_opts=4)
        _write_array(group, "index", np.asarray(source.index, dtype="<i8"))


def _little_endian(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.asarray(values).dtype.newbyteorder("<"), copy=False)


# -- digest ------------------------------------------------------------------------------------------------


def content_digest(zoo: Zoo) -> str:
    """SHA-256 of the content as FORMAT.md defines it: ``sha256:...``."""
    digest = ContentDigest()
    for name, population in sorted(zoo.populations.items()):
        digest.begin(name, population)
        for start in range(0, population.rows, BLOCK_ROWS):
            block = population.weights[start : start + BLOCK_ROWS]
            digest.block(np.ascontiguousarray(block, dtype=STORAGE[population.dtype]).data)
        digest.end(population)
    return digest.finish(zoo.recipe)


class ContentDigest:
    """SHA-256 of a zoo's content, fed with one population after the other, in order of name.

    Weights come in blocks between :meth:`begin` and :meth:`end`, so that they need not be in memory.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, name: str, population: Population) -> None:
        """All of a population that stands before its weights, which are not looked at."""
        self._text(name)
        self._text(_spec_text(population.spec))
        for value in (population.architecture, population.protocol):
            self._text(canonical_json(value))
        for key, dtype in sorted({**PER_ROW, **PER_NETWORK}.items()):
            self._array(key, dtype, getattr(population, key))
        shape = (len(population.network), population.spec.num_parameters)
        self._header("weights", STORAGE[population.dtype], shape)  # the last of the names in their order

    def block(self, weights: memoryview) -> None:
        """The bytes of some rows; other threads have the interpreter meanwhile."""
        self._digest.update(weights)

    def end(self, population: Population) -> None:
        """What follows the weights."""
        for table in TABLES:
            for key, values in sorted(getattr(population, table).items()):
                self._array(f"{table}/{key}", values.dtype.newbyteorder("<").str, values)

    def finish(self, recipe: Mapping[str, Any] | None) -> str:
        """``sha256:...``."""
        self._text(canonical_json(recipe))
        return f"sha256:{self._digest.hexdigest()}"

    def _text(self, value: str) -> None:
        self._digest.update(value.encode() + b"\0")

    def _header(self, path: str, dtype: str, shape: Sequence[int]) -> None:
        self._text(path)
        self._text(np.dtype(dtype).name)
        self._text(canonical_json(list(shape)))

    def _array(self, path: str, dtype: str, values: np.ndarray) -> None:
        self._header(path, dtype, values.shape)
        self._digest.update(np.ascontiguousarray(values, dtype=dtype).data)


@lru_cache(maxsize=64)  # joined shards share theirs
def _spec_text(spec: WeightSpec) -> str:
    return canonical_json(json.loads(spec.to_json(provenance=False)))


def stored_digest(path: Path) -> str:
    """The digest that the file claims."""
    with _opened(path) as file:
        return str(file.attrs["digest"])


def stored_version(path: Path) -> int:
    """The format version of a file."""
    with _opened(path) as file:
        return int(file.attrs["format_version"])


def verify_digest(path: Path) -> str:
    """Compute the digest anew and compare; returns it.

    Raises:
        ZooError: the content is not what was written.
    """
    found, claimed = content_digest(open_zoo(path)), stored_digest(path)
    if found != claimed:
        raise ZooError(f"zoo {path}: content is damaged: digest should be {claimed}, found {found}")
    return found


# -- reading -----------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.exists():
        raise ZooError(f"zoo {path}: file not found")
    if path.is_dir():
        raise ZooError(f"zoo {path}: expected a file, found a directory")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = str(error)
        if "truncated" in reason:
            raise ZooError(f"zoo {path}: file is truncated; copy or generate it again") from None
        if "signature" in reason:
            raise ZooError(f"zoo {path}: not a zoo: not an HDF5 file") from None
        raise ZooError(f"zoo {path}: cannot be opened ({reason})") from None
    with file:
        try:
            yield file
        # HDF5 reports damaged metadata in as many ways as there are places that can be damaged
        except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, WeightspaceError):
                raise
            raise ZooError(f"zoo {path}: content is damaged ({error})") from None


def open_zoo(path: Path) -> Zoo:
    """Open and validate a zoo file; see ``Zoo.open``."""
    with _opened(path) as file:
        _check_header(path, file)
        try:
            groups = file["populations"]
            populations = {name: _read_population(path, _child(groups, name)) for name in groups}
            signals = _child(file, "sources") if "sources" in file else {}
            sources = {name: _read_source(_child(signals, name)) for name in signals}
            recipe = json.loads(file.attrs["recipe"])
        except ZooError as error:
            raise ZooError(f"zoo {path}: {error}") from None
    return Zoo(populations, sources, recipe, path)


def _check_header(path: Path, file: h5py.File) -> None:
    if file.attrs.get("format") != FORMAT:
        raise ZooError(f"zoo {path}: not a zoo: attribute 'format' should be {FORMAT!r}")
    version = file.attrs.get("format_version")
    version = version.item() if isinstance(version, np.integer) else version
    if not isinstance(version, int) or version < 1:
        raise ZooError(
            f"zoo {path}: attribute 'format_version' should be a positive integer, found {version!r}"
        )
    if version > FORMAT_VERSION:
        raise ZooError(
            f"zoo {path}: format version {version} is newer than {FORMAT_VERSION}, the newest known here; "
            "update weightspace"
        )
    for name in ("digest", "recipe"):
        if name not in file.attrs:
            raise ZooError(f"zoo {path}: attribute {name!r} is missing")
    if not isinstance(file.get("populations"), h5py.Group) or len(file["populations"]) == 0:
        raise ZooError(f"zoo {path}: /populations is missing or empty")


def _read_population(path: Path, group: h5py.Group) -> Population:
    where = group.name
    for name in ("spec", "architecture", "protocol", "weights_dtype"):
        if name not in group.attrs:
            raise ZooError(f"{where}: attribute {name!r} is missing")
    dtype = str(group.attrs["weights_dtype"])
    try:
        spec = WeightSpec.from_json(group.attrs["spec"])
    except SpecError as error:
        raise ZooError(f"{where}: attribute 'spec': {error}") from None
    columns: dict[str, Any] = {name: _dataset(group, name)[()] for name in (*PER_ROW, *PER_NETWORK)}
    tables: dict[str, Any] = {
        table: {name: _dataset(_child(group, table), name)[()] for name in _child(group, table)}
        for table in TABLES
    }
    population = Population(
        spec=spec,
        weights=_mapped(path, _dataset(group, "weights")),
        **columns,
        **tables,
        architecture=_json_object(group, "architecture", nullable=True),
        protocol=_json_object(group, "protocol"),
        dtype=dtype,
    )
    check_population(where, population)
    return population


def _json_object(group: h5py.Group, name: str, *, nullable: bool = False) -> Any:
    value = json.loads(group.attrs[name])
    if not isinstance(value, dict) and not (nullable and value is None):
        raise ZooError(f"{group.name}: attribute {name!r} should be a JSON object")
    return value


def _child(group: h5py.Group, name: str) -> h5py.Group:
    if not isinstance(group.get(name), h5py.Group):
        raise ZooError(f"{group.name.rstrip('/')}/{name}: group is missing")
    return group[name]


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    if not isinstance(group.get(name), h5py.Dataset):
        raise ZooError(f"{group.name}/{name}: dataset is missing")
    return group[name]


def _mapped(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    """Map a contiguous dataset from disk: random access by page fault, from any number of processes."""
    offset = dataset.id.get_offset()
    if dataset.chunks is not None or offset is None:
        raise ZooError(f"{dataset.name}: weights must be stored contiguously")
    if offset + dataset.size * dataset.dtype.itemsize > path.stat().st_size:
        raise ZooError(f"{dataset.name}: reaches beyond the end of the file: it is truncated")
    return np.memmap(path, mode="r", dtype=dataset.dtype, shape=dataset.shape, offset=offset)


def _read_source(group: h5py.Group) -> Source:
    return Source(_dataset(group, "items")[()], _dataset(group, "index")[()])


# -- validation --------------------------------------------------------------------------------------------


def check_population(where: str, population: Population) -> None:
    """Raise ZooError, naming the path inside the file, when arrays contradict each other or the spec."""
    if population.dtype not in STORAGE:
        raise ZooError(
            f"{where}: attribute 'weights_dtype' should be one of {', '.join(STORAGE)}, found {population.dtype!r}"
        )
    weights, networks = population.weights, len(population.source)
    expected = (len(population.network), population.spec.num_parameters)
    _expect(f"{where}/weights", weights, expected, lambda dtype: dtype == np.dtype(STORAGE[population.dtype]))
    if expected[0] == 0:
        raise ZooError(f"{where}/weights: expected at least one row")
    for name, dtype in PER_ROW.items():
        _expect(f"{where}/{name}", getattr(population, name), expected[:1], np.dtype(dtype).__eq__)
    for name, dtype in PER_NETWORK.items():
        _expect(f"{where}/{name}", getattr(population, name), (networks,), np.dtype(dtype).__eq__)
    fits = {table: _is_float if table == "metrics" else _is_number for table in TABLES}
    for table in TABLES:
        length = expected[0] if table == "metrics" else networks
        for name, values in getattr(population, table).items():
            _check_name(f"{where}/{table}", name)
            _expect(f"{where}/{table}/{name}", values, (length,), fits[table])
    _expect_range(f"{where}/network", population.network, networks)
    _expect_range(f"{where}/split", population.split, len(SPLITS))


def _check_name(where: str, name: str) -> None:
    if not name or name == "." or "/" in name:
        raise ZooError(f"{where}: a name should be neither empty nor '.' nor hold a '/', found {name!r}")


def _is_float(dtype: np.dtype) -> bool:
    return dtype == np.float32


def _is_number(dtype: np.dtype) -> bool:
    return dtype in (np.int64, np.float32)


def _expect(where: str, array: np.ndarray, shape: Sequence[int], fits: Callable[[np.dtype], bool]) -> None:
    if tuple(array.shape) != tuple(shape):
        raise ZooError(f"{where}: shape should be {list(shape)}, found {list(array.shape)}")
    if not fits(array.dtype):
        raise ZooError(f"{where}: unexpected type {array.dtype}")


def _expect_range(where: str, values: np.ndarray, limit: int) -> None:
    if len(values) and (values.min() < 0 or values.max() >= limit):
        raise ZooError(
            f"{where}: values should be in 0 .. {limit - 1}, found {values.min()} .. {values.max()}"
        )
