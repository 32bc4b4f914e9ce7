"""The folders of the study of augmentations: as DWSNets', with the label in the file and several views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weightspace.errors import DataError
from weightspace.spec import Weights
from weightspace.zoo.transfer._dwsnets import DWSNets, DWSNetsExport
from weightspace.zoo.transfer._exporter import EXPORTERS, Part
from weightspace.zoo.transfer._importer import IMPORTERS, Note, as_state
from weightspace.zoo.transfer._listing import Listing


@IMPORTERS.register(
    "augmentation",
    paper="Shamsian et al. 2024, arXiv:2402.04081",
    expects="VIEW/NAME_{training|testing}_LABEL_ITEM/checkpoints/*.pth",
)
class Augmentation(DWSNets):
    """INRs of images, several views of each in sibling folders, with the label inside each file."""

    views = True

    def listing(self) -> Listing:
        """As for DWSNets, but the label, which the files say."""
        found = super().listing()
        found.labels = {}
        return found

    def read(self, path: str) -> tuple[Mapping[str, Tensor], Note]:
        """The tensors, and the label beside them."""
        value = self.load(path)
        if not isinstance(value, Mapping) or "label" not in value:
            raise DataError("expected a dictionary with a 'label', found none")
        rest = {name: each for name, each in value.items() if name != "label"}
        return as_state(rest), {"labels": {"label": label_of(value["label"])}}


def label_of(value: Any) -> int:
    """A class number, as a number or as a tensor of one.

    Raises:
        DataError: something else.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(f"label: expected a whole number, found {value!r}")


# -- and back ----------------------------------------------------------------------------------------------


@EXPORTERS.register("augmentation", keeps=("labels", "splits"))
class AugmentationExport(DWSNetsExport):
    """As for DWSNets, with the label inside each file and a folder per view."""

    views = True

    def above(self, part: Part, row: int) -> str:
        """The folder of the view."""
        return f"view_{part.population.view[part.population.network[row]]}/"

    def content(self, state: Weights, label: int) -> Any:
        """The tensors, and the label beside them."""
        return {**state, "label": label}
