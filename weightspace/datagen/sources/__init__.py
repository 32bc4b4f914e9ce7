"""Where the signals come from: one file per source, registered by name."""

from weightspace.datagen.sources._arrays import Arrays
from weightspace.datagen.sources._cifar10 import Cifar10
from weightspace.datagen.sources._digits import Digits
from weightspace.datagen.sources._folder import Folder
from weightspace.datagen.sources._idx import Idx, read_idx
from weightspace.datagen.sources._sequences import Sequences
from weightspace.datagen.sources._sines import Sines
from weightspace.datagen.sources._source import SOURCES, Signals, SourceConfig
from weightspace.datagen.sources._table import Table

__all__ = [
    "SOURCES",
    "Arrays",
    "Cifar10",
    "Digits",
    "Folder",
    "Idx",
    "Sequences",
    "Signals",
    "Sines",
    "SourceConfig",
    "Table",
    "read_idx",
]
