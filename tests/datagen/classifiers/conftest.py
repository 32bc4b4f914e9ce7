"""Data and hyperparameters for populations that are trained in a second."""

import numpy as np
import pytest

from weightspace.datagen.classifiers._data import ClassifierData
from weightspace.datagen.classifiers._families import Task
from weightspace.datagen.classifiers._hyperparameters import CODED, Hyperparameters

DEFAULTS = {
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "schedule": "constant",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "initialiser": "he_normal",
    "initial_scale": 1.0,
    "fraction": 1.0,
    "subset": "first",
    "label_noise": 0.0,
    "batch_size": 8,
    "epochs": 3,
}
WHOLE = ("batch_size", "epochs", "seed")


@pytest.fixture
def data_of():
    """Makes items whose classes can be learnt: prototypes and noise, or tokens of which the last is the class."""

    def make(shape, classes=4, *, train=40, val=12, test=20, vocabulary=None, seed=0):
        random = np.random.default_rng(seed)
        count = train + val + test
        labels = random.integers(0, classes, count)
        if vocabulary is None:
            prototypes = random.normal(size=(classes, *shape))
            inputs = (prototypes[labels] + 0.5 * random.normal(size=(count, *shape))).astype(np.float32)
        else:
            inputs = random.integers(0, vocabulary, (count, *shape))
            inputs[:, -1] = labels
        numbers = random.permutation(count)
        parts = numbers[:train], numbers[train : train + val], numbers[train + val :]
        return ClassifierData(inputs, labels, Task(tuple(shape), classes, vocabulary), *parts, {})

    return make


@pytest.fixture
def hyperparameters_of():
    """Makes hyperparameters from one value for all networks, or a list with one for each."""

    def make(networks, **columns):
        found = {}
        for field, value in {**DEFAULTS, "seed": list(range(networks)), **columns}.items():
            values = value if isinstance(value, list) else [value] * networks
            assert len(values) == networks
            if field in CODED:
                values = [CODED[field].index(name) for name in values]
            whole = field in CODED or field in WHOLE
            found[field] = np.array(values, dtype=np.int64 if whole else np.float64)
        return Hyperparameters(found)

    return make
