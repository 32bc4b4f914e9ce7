"""NFN's folders of SIRENs: the class in the folder's name, the place in the data set in the file's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from weightspace.zoo.transfer._dwsnets import DWSNetsExport, INRFiles, sequential
from weightspace.zoo.transfer._exporter import EXPORTERS, save_state
from weightspace.zoo.transfer._importer import IMPORTERS, INROptions
from weightspace.zoo.transfer._listing import Listing, Problem, natural, walk
from weightspace.zoo.transfer._state_files import PICKLES

_FOLDER = re.compile(r"^(?P<before>.*?)_?(?P<label>\d+)s(?P<after>(?:_.*)?)$")
_FILE = re.compile(r"^net(?P<item>\d+)\.\w+$")


class NFNOptions(INROptions):
    """Of NFN's data sets."""

    split_at: tuple[int, int] | None = Field(
        (45_000, 50_000), description="where val and test begin among the items; null to draw the splits"
    )


@IMPORTERS.register(
    "nfn", paper="Zhou et al. 2023, arXiv:2302.14040", expects="PREFIX_{LABEL}s/net{ITEM}.pth"
)
class NFN(INRFiles):
    """SIRENs with tensors of shape (1, out, in); `*_aug*` folders are further views."""

    options_type = NFNOptions

    def listing(self) -> Listing:
        """Label, item and view, from the names of folders and files."""
        found: list[tuple[int, Any, str, int]] = []
        problems = []
        for path in walk(self.source, PICKLES):
            above, _, name = path.rpartition("/")
            outer, _, inner = above.rpartition("/")
            folder, file = _FOLDER.match(inner), _FILE.match(name)
            if folder is None or file is None:
                problems.append(Problem(path, f"expected a name as in {self.expects}"))
                continue
            family = f"{outer}/{folder['before']}*{folder['after']}"
            found.append((int(file["item"]), ("_aug" in family, natural(family)), path, int(folder["label"])))
        return self._listed(sorted(found), problems)

    def _listed(self, found: Sequence[tuple[int, Any, str, int]], problems: list[Problem]) -> Listing:
        # the copies come after what they are copies of
        views = {family: view for view, family in enumerate(sorted({entry[1] for entry in found}))}
        return Listing(
            paths=[path for _, _, path, _ in found],
            item=[item for item, *_ in found],
            view=[views[family] for _, family, _, _ in found],
            split=self._splits([item for item, *_ in found]),
            labels={"label": [label for *_, label in found]},
            problems=problems if found else [],
        )

    def _splits(self, items: list[int]) -> list[str | None] | None:
        if self.options.split_at is None:
            return None
        val, test = self.options.split_at
        return ["train" if item < val else "val" if item < test else "test" for item in items]


# -- and back ----------------------------------------------------------------------------------------------


@EXPORTERS.register("nfn", keeps=("labels", "splits"))
class NFNExport(DWSNetsExport):
    """SIRENs with tensors of shape (1, out, in), a folder per class and view, with `splits.json`."""

    views = True

    def write(self, folder: Path) -> Iterator[None]:
        """The weights, and after them the splits."""
        (part,) = self.parts
        population = part.population
        entries: list[tuple[str, str, int | None]] = []
        for row, state in part.states():
            network = population.network[row]
            label, view = int(population.labels["label"][network]), population.view[network]
            path = f"{part.name}_{label}s{f'_aug{view}' if view else ''}/net{population.source[network]}.pth"
            save_state(folder / path, {name: tensor[None] for name, tensor in sequential(state).items()})
            entries.append((path, part.split_of(row), label))
            yield
        self.write_splits(folder, entries)
