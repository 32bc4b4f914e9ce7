"""How the outputs of a population's networks are read."""

from __future__ import annotations

from weightspace.datasets.augment import Signal
from weightspace.errors import ZooError
from weightspace.zoo import Population, Zoo, source_of


def signal_of(zoo: Zoo, population: Population) -> Signal:
    """The constant that its architecture adds to outputs, and the middle of the signals that the zoo stores."""
    arguments = (population.architecture or {}).get("arguments", {})
    try:
        source = source_of(zoo, population)
    except ZooError:  # it stores several, and does not say which
        source = None
    centred = source is not None and source.items.dtype.kind == "f" and bool((source.items < 0).any())
    return Signal(offset=float(arguments.get("output_offset", 0.0)), middle=0.0 if centred else 0.5)
