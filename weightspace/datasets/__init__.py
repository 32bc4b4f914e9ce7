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
from weightspace.datasets._dataset import ZooDataset, choose_population, target_values
from weightspace.datasets._normalisation import Normalisation

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Compose",
    "GaussianNoise",
    "Normalisation",
    "Permutation",
    "SignFlip",
    "SymmetryAugmentation",
    "ZooDataset",
    "choose_population",
    "parse_augmentations",
    "target_values",
]
