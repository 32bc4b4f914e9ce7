"""Populations of classifiers: sampled architectures and hyperparameters, trained many at a time."""

from weightspace.datagen.classifiers._copies import COPIES, prune, quantise
from weightspace.datagen.classifiers._data import classifier_data
from weightspace.datagen.classifiers._families import FAMILIES
from weightspace.datagen.classifiers._hyperparameters import TrainingConfig
from weightspace.datagen.classifiers._recipe import ClassifierRecipe

__all__ = [
    "COPIES",
    "FAMILIES",
    "ClassifierRecipe",
    "TrainingConfig",
    "classifier_data",
    "prune",
    "quantise",
]
