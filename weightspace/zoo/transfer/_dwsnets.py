"""DWSNets' folders: one pickled state dict per coordinate network, the item in the folder's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from weightspace.spec import Weights
from weightspace.zoo.transfer._designs import Design, mlp_design
from weightspace.zoo.transfer._exporter import EXPORTERS, Exporter, Part, save_state
from weightspace.zoo.transfer._importer import IMPORTERS, FileImporter, INROptions, Note
from weightspace.zoo.transfer._listing import Listing, Problem, natural, walk
from weightspace.zoo.transfer._state_files import PICKLES

ITEM = re.compile(r"(?:^|_)(?P<part>train|training|test|testing)_(?P<label>\d+)_(?P<number>\d+)$")


TRAIN_ITEMS = 60_000


class DWSNetsOptions(INROptions):
    """Of DWSNets' protocol."""

    output_offset: float = Field(0.5, description="constant that is added to the output")
    train_items: int = Field(
        TRAIN_ITEMS,
        ge=1,
        description="items in the training set, after which those of the test set are numbered",
    )


class INRFiles(FileImporter):
    """Coordinate networks, one per file."""

    def design(self, shapes: Mapping[str, tuple[int, ...]], note: Note) -> Design:
        """An MLP, with what the options say of its activation."""
        options = self.options
        design = mlp_design(shapes, options.activation, options.w0, options.output_offset)
        protocol = {
            "activation": options.activation,
            "w0": options.w0,
            "output_offset": options.output_offset,
            "said_by": "the options of the import; the files hold weights alone",
        }
        return Design(design.spec, design.tensors, design.architecture, protocol, options.population)


@IMPORTERS.register(
    "dwsnets",
    paper="Navon et al. 2023, arXiv:2301.12780",
    expects="NAME_{training|testing}_LABEL_ITEM/checkpoints/*.pth",
)
class DWSNets(INRFiles):
    """INRs of images as DWSNets publishes them; `--splits` takes its JSON."""

    options_type = DWSNetsOptions
    views = False

    def listing(self) -> Listing:
        """Item, label and part of the data set, from the names of folders."""
        found: list[tuple[int, str, str, int, bool]] = []
        problems = []
        for path in walk(self.source, PICKLES):
            place = item_folder(path)
            if place is None:
                problems.append(Problem(path, f"expected a name as in {self.expects}"))
                continue
            above, match = place
            number, is_test = int(match["number"]), match["part"].startswith("test")
            if number >= self.options.train_items and not is_test:
                problems.append(
                    Problem(path, f"its item is beyond train_items, {self.options.train_items:,}")
                )
                continue
            item = number + self.options.train_items * is_test
            found.append((item, above if self.views else "", path, int(match["label"]), is_test))
        return self._listed(sorted(found), problems)

    def _listed(self, found: Sequence[tuple[int, str, str, int, bool]], problems: list[Problem]) -> Listing:
        views = {
            folder: view for view, folder in enumerate(sorted({entry[1] for entry in found}, key=natural))
        }
        official = len({is_test for *_, is_test in found}) == 2
        return Listing(
            paths=[path for _, _, path, _, _ in found],
            item=[item for item, *_ in found],
            view=[views[folder] for _, folder, *_ in found],
            split=["test" if is_test else None for *_, is_test in found] if official else None,
            labels={"label": [label for *_, label, _ in found]},
            problems=problems if found else [],
        )


def item_folder(path: str) -> tuple[str, re.Match[str]] | None:
    """The folder above that of the item, and what the item's name says; None for a path without one."""
    parts = path.split("/")
    for at in range(len(parts) - 2, -1, -1):
        match = ITEM.search(parts[at])
        if match:
            return "/".join(parts[:at]), match
    return None


# -- and back ----------------------------------------------------------------------------------------------


@EXPORTERS.register("dwsnets", keeps=("labels", "splits"))
class DWSNetsExport(Exporter):
    """A pickled state dict per INR, with `splits.json`; items from 60,000 on are called testing."""

    views = False

    def check(self) -> None:
        """INRs with a label."""
        self.check_inrs(self.views)

    def write(self, folder: Path) -> Iterator[None]:
        """The weights, and after them the splits."""
        (part,) = self.parts
        entries: list[tuple[str, str, int | None]] = []
        for row, state in part.states():
            label = int(part.population.labels["label"][part.population.network[row]])
            path = f"{self.above(part, row)}{_item_name(part, row, label)}/checkpoints/step_{part.population.step[row]}.pth"
            save_state(folder / path, self.content(sequential(state), label))
            entries.append((path, part.split_of(row), label))
            yield
        self.write_splits(folder, entries)

    def above(self, part: Part, row: int) -> str:
        """The folder above that of the item."""
        return ""

    def content(self, state: Weights, label: int) -> Any:
        """What is in a file."""
        return state

    def left_out(self) -> list[str]:
        """Also other labels."""
        others = {name for part in self.parts for name in part.population.labels if name != "label"}
        return sorted(f"labels/{name}" for name in others) + super().left_out()


def sequential(state: Weights) -> Weights:
    """An MLP's tensors under the names that its layers have in a sequence, each with its own memory."""
    return {name.replace("layers.", "seq.", 1): tensor.clone() for name, tensor in state.items()}


def _item_name(part: Part, row: int, label: int) -> str:
    item = int(part.population.source[part.population.network[row]])
    which, number = ("training", item) if item < TRAIN_ITEMS else ("testing", item - TRAIN_ITEMS)
    return f"{part.name}_{which}_{label}_{number}"
