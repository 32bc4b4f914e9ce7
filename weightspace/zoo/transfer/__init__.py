"""Zoos from the layouts that the field has, and into them."""

from weightspace.zoo.transfer import (  # noqa: F401 (they register themselves)
    _augmentation,
    _cnn_wild_park,
    _dwsnets,
    _folder,
    _model_zoos,
    _nfn,
    _small_cnn_zoo,
)
from weightspace.zoo.transfer._export import ExportReport, export_zoo
from weightspace.zoo.transfer._exporter import EXPORTERS, Exporter
from weightspace.zoo.transfer._import import ImportReport, import_zoo
from weightspace.zoo.transfer._importer import IMPORTERS, FileImporter, Importer, ImportOptions
from weightspace.zoo.transfer._listing import Listing, Problem

__all__ = [
    "EXPORTERS",
    "IMPORTERS",
    "ExportReport",
    "Exporter",
    "FileImporter",
    "ImportOptions",
    "ImportReport",
    "Importer",
    "Listing",
    "Problem",
    "export_zoo",
    "import_zoo",
]
