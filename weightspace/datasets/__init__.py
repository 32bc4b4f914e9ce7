"""Zoos as PyTorch data sets: batches, splits, normalisation, augmentation in weight space."""

from weightspace.datasets._dataset import ZooDataset, choose_population, population_names, target_values
from weightspace.datasets._normalisation import Normalisation
from weightspace.datasets._populations import (
    PopulationBatches,
    PopulationsDataset,
    open_populations,
)
from weightspace.datasets.augment import (
    AUGMENTATIONS,
    Augmentation,
    Batch,
    Compose,
    Draws,
    GaussianNoise,
    LabelSmoothing,
    MixUp,
    Permutation,
    PhaseShift,
    PositiveScaling,
    QuantileDropout,
    Signal,
    SignFlip,
    SymmetryAugmentation,
    Views,
    WeightDropout,
    parse_augmentations,
)

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Batch",
    "Compose",
    "Draws",
    "GaussianNoise",
    "LabelSmoothing",
    "MixUp",
    "Normalisation",
    "Permutation",
    "PhaseShift",
    "PopulationBatches",
    "PopulationsDataset",
    "PositiveScaling",
    "QuantileDropout",
    "SignFlip",
    "Signal",
    "SymmetryAugmentation",
    "Views",
    "WeightDropout",
    "ZooDataset",
    "choose_population",
    "open_populations",
    "parse_augmentations",
    "population_names",
    "target_values",
]
