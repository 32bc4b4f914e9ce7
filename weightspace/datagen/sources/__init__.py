"""Where the signals come from: one file per source, registered by name."""

from weightspace.datagen.sources._digits import Digits
from weightspace.datagen.sources._idx import Idx, read_idx
from weightspace.datagen.sources._source import SOURCES, Signals, SourceConfig

__all__ = ["SOURCES", "Digits", "Idx", "Signals", "SourceConfig", "read_idx"]
