"""What every importer is: it lists a source, and reads it block by block. The driver does the rest."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from weightspace.configuration import Registry
from weightspace.errors import DataError, SpecError
from weightspace.zoo.transfer._designs import Design
from weightspace.zoo.transfer._listing import Listing
from weightspace.zoo.transfer._state_files import SAFE, StateReader, read_tensors

BLOCK_FILES, BLOCK_BYTES = 256, 2**22  # what is kept at once: a killed import loses less than that
WRAPPERS, _WRAPPINGS = ("state_dict", "model_state_dict", "model"), 4  # a dictionary may hold itself
_REPEATED = 2**20  # numbers of a tensor that repeats a few: a short file could ask for any memory
Note = dict[str, Any]


class ImportOptions(BaseModel):
    """What every format asks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fractions: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1),
        description="share of the items in train, val and test, where the source does not say",
    )
    seed: int = Field(0, ge=0, description="of that split")


class INROptions(ImportOptions):
    """What the files of coordinate networks do not say."""

    activation: str = Field("sine", description="of the hidden layers")
    w0: float = Field(
        30.0, gt=0, description="frequency of the sine, which the files leave out of the weights"
    )
    output_offset: float = Field(0.0, description="constant that is added to the output")
    population: str = Field("inr", description="its name in the zoo")


@dataclass(frozen=True)
class Block:
    """Some checkpoints, read.

    Args:
        rows: (n, P) float32 by population.
        notes: one for each checkpoint: ``{"bad": reason}``, or ``{"population": name}`` with what was found in the file
            (``labels``, ``metrics``, ``hyperparameters``).
    """

    rows: Mapping[str, np.ndarray]
    notes: Sequence[Note]


class Importer:
    """Reads one layout.

    Args:
        source: the folder.
        options: of the format.
        skip_bad: go on after a file that cannot be read.

    Attributes:
        format: under which it is registered in ``IMPORTERS``.
        paper: where the layout comes from.
        expects: the files that it looks for, for messages and the docs.
    """

    format: ClassVar[str]
    paper: ClassVar[str] = ""
    expects: ClassVar[str] = ""
    options_type: ClassVar[type[ImportOptions]] = ImportOptions
    step_unit: ClassVar[str] = "updates"

    def __init__(self, source: Path, options: Any, *, skip_bad: bool = False) -> None:
        self.source, self.options, self.skip_bad = source, options, skip_bad
        self.designs: dict[str, Design] = {}

    def check_source(self) -> None:
        """Raise DataError for a source of another kind."""
        if not self.source.exists():
            raise DataError(f"source {self.source}: not found; expected a folder with {self.expects}")
        if not self.source.is_dir():
            raise DataError(f"source {self.source}: expected a folder with {self.expects}, found a file")

    def listing(self) -> Listing:
        """All that is known without reading weights.

        Raises:
            DataError: nothing of this layout, or tables that are damaged.
        """
        raise NotImplementedError

    def file(self, listing: Listing, place: int) -> str | Path:
        """That of a checkpoint's weights: when it has changed, what was read of it does not count."""
        raise NotImplementedError

    def blocks(self, listing: Listing, start: int) -> Iterator[Block]:
        """The checkpoints from one place on.

        Raises:
            DataError: one is bad, and ``skip_bad`` is False.
        """
        raise NotImplementedError

    def meet(self, listing: Listing, place: int) -> None:
        """Know the design of a checkpoint's population again, when its rows were kept by a call before."""
        raise NotImplementedError

    def nothing(self) -> DataError:
        """The source holds no network."""
        return DataError(f"source {self.source}: expected {self.expects}, found none")


IMPORTERS: Registry[type[Importer]] = Registry("importer", "format")
"""The layouts that ``weightspace import`` reads; ``@IMPORTERS.register("name", paper=...)`` adds one."""


class FileImporter(Importer):
    """Reads one file per checkpoint."""

    def __init__(self, source: Path, options: Any, *, skip_bad: bool = False) -> None:
        super().__init__(source, options, skip_bad=skip_bad)
        self._states, self._base = StateReader(), os.path.join(source, "")
        self._known: dict[Hashable, str] = {}
        self._first = ""

    def file(self, listing: Listing, place: int) -> str | Path:
        """One per checkpoint."""
        return f"{self._base}{listing.paths[place]}"

    def read(self, path: str) -> tuple[Mapping[str, Tensor], Note]:
        """The tensors of a file, and what else it says; keys with an underscore are for :meth:`kind` and :meth:`design`.

        Raises:
            DataError: damaged, or not of this layout.
        """
        return as_state(self.load(path)), {}

    def load(self, path: str) -> Any:
        """What a file holds.

        Raises:
            DataError: damaged, or something that would have to be unpickled.
        """
        if path.endswith(SAFE):
            return read_tensors(self.source / path)[0]
        return self._states.read(f"{self._base}{path}")

    def kind(self, note: Note) -> Hashable:
        """What, beside names and shapes, makes two networks of different architecture."""
        return None

    def design(self, shapes: Mapping[str, tuple[int, ...]], note: Note) -> Design:
        """The design of a file's network.

        Raises:
            DataError: the shapes are not those of such a network.
        """
        raise NotImplementedError

    def blocks(self, listing: Listing, start: int) -> Iterator[Block]:
        """The checkpoints from one place on."""
        place = start
        while place < len(listing.paths):
            rows: dict[str, list[Tensor]] = {}
            notes: list[Note] = []
            size = 0
            while place < len(listing.paths) and len(notes) < BLOCK_FILES and size < BLOCK_BYTES:
                note, row = self._checkpoint(listing.paths[place])
                if row is not None:
                    rows.setdefault(note["population"], []).append(row)
                    size += row.nbytes
                notes.append(note)
                place += 1
            yield Block({name: torch.stack(found).numpy() for name, found in rows.items()}, notes)

    def meet(self, listing: Listing, place: int) -> None:
        """Know the design of a checkpoint's population again."""
        self._checkpoint(listing.paths[place])

    def _checkpoint(self, path: str) -> tuple[Note, Tensor | None]:
        try:
            tensors, note = self.read(path)
            # names, shapes and types by which files are told apart: nothing else is looked at in most of them
            kind = (self.kind(note), *[(name, each.shape, each.dtype) for name, each in tensors.items()])
            name = self._known.get(kind) or self._met(kind, path, tensors, note)
            with torch.no_grad():
                row = torch.cat([tensors[each].reshape(-1).float() for each in self.designs[name].tensors])
        except DataError as error:
            if not self.skip_bad:
                raise DataError(f"{self.source / path}: {error}; --skip-bad leaves such files out") from None
            return {"bad": str(error)}, None
        return {"population": name, **{key: each for key, each in note.items() if key[0] != "_"}}, row

    def _met(self, kind: Hashable, path: str, tensors: Mapping[str, Tensor], note: Note) -> str:
        """The population of a network that is unlike those before."""
        shapes = {name: tuple(each.shape) for name, each in tensors.items() if each.is_floating_point()}
        odd = next((name for name, each in tensors.items() if each.is_complex() or each.is_quantized), None)
        if odd is not None or not shapes:
            raise DataError(
                f"{odd}: expected numbers with a point" if odd else "no tensors of numbers with a point"
            )
        try:
            design = self.design(shapes, note)
        except SpecError as error:
            raise DataError(str(error)) from None
        _check_tensors(design, shapes)
        name = next((name for name, known in self.designs.items() if known == design), None)
        if name is None:
            name = self.name_of(design)
            if name in self.designs:
                raise DataError(f"its tensors are {_told(shapes)}, those of {self._first} are others")
            self.designs[name] = design
        self._first = self._first or path
        self._known[kind] = name
        return name

    def name_of(self, design: Design) -> str:
        """Of a new population; one that exists is refused, as a network that does not fit to the others."""
        return design.name


def as_state(value: Any, wrappings: int = _WRAPPINGS) -> Mapping[str, Tensor]:
    """A state dict, also one that is wrapped, so many times at most, as in ``{"state_dict": ...}``.

    Raises:
        DataError: something else.
    """
    if isinstance(value, Mapping):
        for key in WRAPPERS if wrappings else ():
            if isinstance(value.get(key), Mapping):
                return as_state(value[key], wrappings - 1)
        if value and all(isinstance(each, Tensor) and type(name) is str for name, each in value.items()):
            odd = next((name for name, each in value.items() if not _is_plain(each)), None)
            if odd is None:
                return value
            raise DataError(f"{odd}: expected a tensor whose numbers are all in the file")
    found = (
        f"an entry {_odd(value)!r}" if isinstance(value, Mapping) and value else f"a {type(value).__name__}"
    )
    raise DataError(f"expected a state dict of tensors, found {found}")


def _is_plain(tensor: Tensor) -> bool:
    """Neither sparse, nor without numbers, nor far larger than what it is made of."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    if tensor.numel() <= _REPEATED or tensor.is_contiguous():
        return True
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_tensors(design: Design, shapes: Mapping[str, tuple[int, ...]]) -> None:
    unknown = next((name for name in shapes if name not in design.tensors), None)
    if unknown is not None:
        raise DataError(f"{unknown}: no tensor of such a network")
    for name, expected in zip(design.tensors, design.spec.tensors.values(), strict=True):
        if name not in shapes:
            raise DataError(f"{name}: missing, or not of a type with a point")
        if math.prod(shapes[name]) != expected.numel:
            raise DataError(f"{name}: expected shape {list(expected.shape)}, found {list(shapes[name])}")


def _odd(value: Mapping[Any, Any]) -> str:
    odd = (str(k) for k, each in value.items() if not isinstance(each, Tensor) or not isinstance(k, str))
    return next(odd, "")


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Shapes in words, the first of them."""
    listed = [f"{name} {list(shape)}" for name, shape in list(shapes.items())[:4]]
    return ", ".join(listed) + (", ..." if len(shapes) > 4 else "")
