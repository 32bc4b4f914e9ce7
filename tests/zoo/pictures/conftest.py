"""Zoos of classifiers in memory: random weights, invented metrics, hyperparameters that matter."""

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from weightspace.nets import CNN, MLP, RNN, architecture_of
from weightspace.zoo import Population, Zoo, spec_of, split_items

EPOCHS = np.array([0, 1, 5, 10])
OPTIMIZERS = ["sgd", "adam", "rmsprop"]


def cnn():
    return CNN((1, 8, 8), (4, 4), 3)


def mlp():
    return MLP((64, 16, 10), activation="relu", input_shape=(1, 8, 8))


def rnn():
    return RNN(6, 8, 4)


@cache
def _spec(cls, arguments):
    return spec_of(cls(**json.loads(arguments)))


def population(net, networks=60, seed=0, epochs=EPOCHS, hyperparameters=None, choices=None, diverged=()):
    """Checkpoints at ``epochs``; accuracy rises with the learning rate, and with the first weights' scale."""
    generator = np.random.default_rng(seed)
    spec, rows = _spec(type(net), json.dumps(net.arguments())), networks * len(epochs)
    rate = 10 ** generator.uniform(-4, -1, networks)
    final = 0.2 + 0.7 * (np.log10(rate) + 4) / 3
    accuracy = 0.1 + (final[:, None] - 0.1) * (1 - np.exp(-np.asarray(epochs) / 2))
    direction = torch.randn(spec.num_parameters, generator=torch.Generator().manual_seed(seed)).numpy()
    weights = generator.normal(size=(rows, spec.num_parameters)) + 2 * accuracy.reshape(-1, 1) * direction
    flag = np.zeros((networks, len(epochs)))
    flag[list(diverged), -1] = 1
    return Population(
        spec=spec,
        weights=weights.astype(np.float32),
        network=np.repeat(np.arange(networks), len(epochs)),
        step=np.tile(np.asarray(epochs) * 100, networks),
        source=np.arange(networks),
        view=np.zeros(networks, np.int64),
        split=split_items(np.arange(networks), (0.5, 0.2, 0.3), 0),
        metrics={
            "epoch": np.tile(epochs, networks).astype(np.float32),
            "test_accuracy": accuracy.ravel().astype(np.float32),
            "test_loss": (2.5 - 2 * accuracy).ravel().astype(np.float32),
            "diverged": flag.ravel().astype(np.float32),
        },
        hyperparameters={
            "learning_rate": rate.astype(np.float32),
            "dropout": generator.uniform(0, 0.6, networks).astype(np.float32),
            "weight_decay": np.where(
                np.arange(networks) % 4, 10 ** generator.uniform(-6, -2, networks), 0
            ).astype(np.float32),
            "optimizer": np.arange(networks) % len(OPTIMIZERS),
            "batch_size": np.array([32, 128])[np.arange(networks) % 2],
            "epochs": np.full(networks, 10),
            "seed": np.arange(networks) * 17,
        }
        if hyperparameters is None
        else hyperparameters,
        architecture=architecture_of(net),
        protocol={"choices": {"optimizer": OPTIMIZERS} if choices is None else choices},
    )


def classifier_zoo(net=None, **how):
    return Zoo({"cnn": population(net or cnn(), **how)}, recipe={"name": "made-up", "seed": 0})


def axes_by_label(figure):
    """The panels of a figure under what stands below them."""
    return {axes.get_xlabel(): axes for axes in figure.axes if axes.get_xlabel()}


@pytest.fixture(scope="session")
def made():
    """Networks, populations and zoos of classifiers, and how to find the panels of their figures."""
    return SimpleNamespace(
        cnn=cnn,
        mlp=mlp,
        rnn=rnn,
        population=population,
        zoo=classifier_zoo,
        panels=axes_by_label,
        epochs=EPOCHS,
        optimizers=OPTIMIZERS,
    )
