"""Augmentations of whole batches of weights, read from the spec's symmetries."""

from weightspace.datasets.augment._augmentation import (
    AUGMENTATIONS,
    Augmentation,
    Compose,
    SymmetryAugmentation,
    parse_augmentations,
)
from weightspace.datasets.augment._batch import Batch, Signal, Targets
from weightspace.datasets.augment._draws import Draws
from weightspace.datasets.augment._mixup import MixUp
from weightspace.datasets.augment._noise import GaussianNoise, LabelSmoothing, QuantileDropout, WeightDropout
from weightspace.datasets.augment._symmetries import Permutation, PhaseShift, PositiveScaling, SignFlip
from weightspace.datasets.augment._views import Views

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Batch",
    "Compose",
    "Draws",
    "GaussianNoise",
    "LabelSmoothing",
    "MixUp",
    "Permutation",
    "PhaseShift",
    "PositiveScaling",
    "QuantileDropout",
    "SignFlip",
    "Signal",
    "SymmetryAugmentation",
    "Targets",
    "Views",
    "WeightDropout",
    "parse_augmentations",
]
