"""Every error that a user can mend. Each also subclasses the built-in that a caller would catch.

Messages are one sentence that names the field or tensor, what was expected, what was found, and where.
The command prints that sentence and exits with code 2.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "OutputError",
    "RecipeError",
    "RunError",
    "SpecError",
    "SpecWarning",
    "TaskError",
    "WeightspaceError",
    "ZooError",
]


class WeightspaceError(Exception):
    """Base class: something that the user can mend."""


class SpecError(WeightspaceError, ValueError):
    """A weight-space description that contradicts itself, or weights that do not fit it."""


class SpecWarning(UserWarning):
    """A spec that may be smaller than it could be, never wrong."""


class ConfigError(WeightspaceError, ValueError):
    """A configuration value that is out of range or unknown."""


class RecipeError(ConfigError):
    """A recipe that cannot be found, read or validated."""


class DataError(WeightspaceError, ValueError):
    """Source data (images, labels) that are missing, truncated or malformed."""


class ZooError(WeightspaceError, ValueError):
    """A file that is not a zoo, is damaged, or is of a version that is not known."""


class CheckpointError(WeightspaceError, ValueError):
    """A checkpoint that cannot be read or does not fit its architecture."""


class OutputError(WeightspaceError, FileExistsError):
    """An output that exists already, or cannot be written."""


class RunError(WeightspaceError, ValueError):
    """A run directory that is not one, or has no checkpoint."""


class TaskError(WeightspaceError, ValueError):
    """A task that needs labels or metrics which the zoo lacks."""


class DeviceError(WeightspaceError, RuntimeError):
    """A device that this machine does not have."""
