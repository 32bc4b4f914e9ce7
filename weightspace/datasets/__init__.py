"""Zoos as PyTorch data sets: batches, splits, normalisation, augmentation in weight space."""

from weightspace.datasets._augment import (
    AUGMENTATIONS,
    Augmentation,
    Compose,
    GaussianNoise,
    Permutation,
    SignFlip,
    SymmetryAugmentation,
    parse_augmentations,
)
from weightspace.datasets._dataset import ZooDataset, choose_population, population_names, target_values
from weightspace.datasets._normalisation import Normalisation
from weightspace.datasets._populations import (
    PopulationBatches,
    PopulationsDataset,
    open_populations,
)

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Compose",
    "GaussianNoise",
    "Normalisation",
    "Permutation",
    "PopulationBatches",
    "PopulationsDataset",
    "SignFlip",
    "SymmetryAugmentation",
    "ZooDataset",
    "choose_population",
    "open_populations",
    "parse_augmentations",
    "population_names",
    "target_values",
]
