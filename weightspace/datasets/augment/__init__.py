"""Augmentations of whole batches of weights, read from the spec's symmetries."""

from weightspace.datasets.augment._augmentation import (
    AUGMENTATIONS,
    Augmentation,
    Compose,
    SymmetryAugmentation,
    options,
    parse_augmentations,
)
from weightspace.datasets.augment._batch import Batch, Signal, Targets
from weightspace.datasets.augment._draws import Draws
from weightspace.datasets.augment._mixup import MixUp
from weightspace.datasets.augment._noise import GaussianNoise, LabelSmoothing, QuantileDropout, WeightDropout
from weightspace.datasets.augment._space import (
    Brightness,
    Contrast,
    CoordinateAugmentation,
    CoordinateScaling,
    DeepTranslation,
    Negation,
    Reflection,
    Rotation,
    SpaceAugmentation,
    Translation,
    ValueAugmentation,
    map_coordinates,
    map_values,
)
from weightspace.datasets.augment._symmetries import Permutation, PhaseShift, PositiveScaling, SignFlip
from weightspace.datasets.augment._views import Views

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Batch",
    "Brightness",
    "Compose",
    "Contrast",
    "CoordinateAugmentation",
    "CoordinateScaling",
    "DeepTranslation",
    "Draws",
    "GaussianNoise",
    "LabelSmoothing",
    "MixUp",
    "Negation",
    "Permutation",
    "PhaseShift",
    "PositiveScaling",
    "QuantileDropout",
    "Reflection",
    "Rotation",
    "SignFlip",
    "Signal",
    "SpaceAugmentation",
    "SymmetryAugmentation",
    "Targets",
    "Translation",
    "ValueAugmentation",
    "Views",
    "WeightDropout",
    "map_coordinates",
    "map_values",
    "options",
    "parse_augmentations",
]
