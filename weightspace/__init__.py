"""weightspace: learning on the weights of neural networks.

Generate populations of trained networks, load them as PyTorch data sets, train metanetworks that respect
their symmetries, align and merge them.
"""

from typing import TYPE_CHECKING, Any

from weightspace import errors, spec, zoo
from weightspace.spec import Weights, WeightSpec
from weightspace.zoo import Zoo

if TYPE_CHECKING:
    from weightspace import align, datagen, datasets, merge, models, nets, tasks
    from weightspace.datagen import generate
    from weightspace.datasets import (
        Batch,
        Compose,
        GaussianNoise,
        MixUp,
        Normalisation,
        Permutation,
        SignFlip,
        ZooDataset,
    )
    from weightspace.models import from_graph, to_graph

__version__ = "0.1.0"

# Loaded when first used: rooms that need numba, Lightning or scikit-learn do not slow down those that do not.
_ROOMS = ("align", "datagen", "datasets", "merge", "models", "nets", "tasks")
_NAMES = {
    "Batch": "datasets",
    "Compose": "datasets",
    "GaussianNoise": "datasets",
    "MixUp": "datasets",
    "Normalisation": "datasets",
    "Permutation": "datasets",
    "SignFlip": "datasets",
    "ZooDataset": "datasets",
    "from_graph": "models",
    "generate": "datagen",
    "to_graph": "models",
}

__all__ = [
    "Batch",
    "Compose",
    "GaussianNoise",
    "MixUp",
    "Normalisation",
    "Permutation",
    "SignFlip",
    "WeightSpec",
    "Weights",
    "Zoo",
    "ZooDataset",
    "align",
    "datagen",
    "datasets",
    "errors",
    "from_graph",
    "generate",
    "merge",
    "models",
    "nets",
    "spec",
    "tasks",
    "to_graph",
    "zoo",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"weightspace.{name}")
    if name in _NAMES:
        return getattr(import_module(f"weightspace.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'weightspace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS, *_NAMES])
