"""Tables beside the weights: CSV and JSON, and what becomes of their columns."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from weightspace.errors import DataError

Table = dict[str, list[Any]]
FEW = 64  # different texts of a column; what has more is a name or a path, and no category
_INT64 = 2**63


def read_table(path: Path) -> Table:
    """The columns of a table, one value per row each; of JSON, a list of objects or an object of lists.

    Values of a CSV are texts. An object whose values are all objects has a row for each, called ``path``.

    Raises:
        DataError: missing, damaged, ragged, or no table.
    """
    if path.name.endswith((".csv", ".csv.gz")):
        return _csv(path)
    document = read_json(path)
    if (
        isinstance(document, dict)
        and document
        and all(isinstance(value, dict) for value in document.values())
    ):
        document = [{"path": name, **row} for name, row in document.items()]
    if isinstance(document, dict) and all(isinstance(column, list) for column in document.values()):
        return _even(path, document)
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise DataError(f"{path}: expected a list of JSON objects, or an object of lists")
    names = dict.fromkeys(name for row in document for name in row)
    return {name: [row.get(name) for row in document] for name in names}


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DataError: missing, or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None


def _even(path: Path, columns: Mapping[str, list[Any]]) -> Table:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{path}: expected lists of one length, found {told}")
    return dict(columns)


def _csv(path: Path) -> Table:
    with _opened(path) as file:
        rows = csv.reader(file)
        names = next(rows, [])
        twice = next((name for name in names if names.count(name) > 1), None)
        if not names or twice is not None:
            raise DataError(f"{path}: expected a first line of different names, found {twice!r} twice" if names else
                            f"{path}: expected a first line of names, found an empty file")  # fmt: skip
        columns: list[list[Any]] = [[] for _ in names]
        known: dict[str, str] = {}  # equal texts are kept once: tables of checkpoints repeat themselves
        for number, row in enumerate(rows, 2):
            if len(row) != len(names):
                if not row:
                    continue
                raise DataError(f"{path}, line {number}: expected {len(names)} values, found {len(row)}")
            for column, value in zip(columns, row, strict=True):
                column.append(known.setdefault(value, value))
    return dict(zip(names, columns, strict=True))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", newline="", encoding="utf-8-sig") as file:
                yield file
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
                yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise DataError(f"{path}: damaged, or no CSV ({error})") from None


# -- columns -----------------------------------------------------------------------------------------------


def numbers(values: Sequence[Any]) -> np.ndarray | None:
    """int64 where all are whole numbers, else float64; None where there is text. What is missing is NaN.

    Example:
        >>> numbers(["3", "4"]), numbers(["1e-3", ""]), numbers(["adam"])
        (array([3, 4]), array([0.001,   nan]), None)
    """
    try:
        found = [_number(value) for value in values]
        whole = all(isinstance(value, int) and -_INT64 <= value < _INT64 for value in found)
        return np.array(found, dtype=np.int64 if whole else np.float64)
    except (ValueError, OverflowError):
        return None


def is_whole(values: Sequence[Any]) -> bool:
    """Whether what is there is whole numbers, though some may be missing."""
    found = [_number(value) for value in values]
    return all((isinstance(value, int) and -_INT64 <= value < _INT64) or value != value for value in found)


def _number(value: Any) -> int | float:
    if value is None or (isinstance(value, str) and value.strip() in ("", "None", "null")):
        return math.nan
    if isinstance(value, str):
        if value.strip() in ("True", "False", "true", "false"):
            return int(value.strip() in ("True", "true"))
        if "_" in value:  # 1_0 is 10 for Python, and a name for everybody else
            raise ValueError(f"expected a number, found {value!r}")
        try:
            return int(value)
        except ValueError:
            return float(value)
    if isinstance(value, bool | int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value)
    raise ValueError(f"expected a number, found {value!r}")


def texts(values: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """int64 codes and the names that they stand for, sorted; None where it is no text, or too many different ones.

    Example:
        >>> texts(["sgd", "adam", "sgd"])
        (array([1, 0, 1]), ('adam', 'sgd'))
    """
    if not all(isinstance(value, str | int | float | None) for value in values):
        return None
    words = ["" if value is None else str(value) for value in values]
    names = tuple(sorted(set(words)))
    if len(names) > FEW:
        return None
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[word] for word in words], dtype=np.int64), names
