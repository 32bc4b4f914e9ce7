"""The small networks that zoos are made of: plain ``nn.Module`` classes that know no other room."""

from weightspace.nets._activations import ACTIVATIONS, Activation
from weightspace.nets._batched import (
    PRESETS,
    architecture_of,
    build,
    coordinate_grid,
    evaluate_batch,
    forward_and_statistics,
)
from weightspace.nets._cnn import CNN
from weightspace.nets._dropout import Dropout, dropout_state, random_keys
from weightspace.nets._mlp import MLP
from weightspace.nets._network import NETWORKS, Network
from weightspace.nets._norms import BatchNorm, statistic_names
from weightspace.nets._resnet import ResNet
from weightspace.nets._rnn import RNN

__all__ = [
    "ACTIVATIONS",
    "CNN",
    "MLP",
    "NETWORKS",
    "PRESETS",
    "RNN",
    "Activation",
    "BatchNorm",
    "Dropout",
    "Network",
    "ResNet",
    "architecture_of",
    "build",
    "coordinate_grid",
    "dropout_state",
    "evaluate_batch",
    "forward_and_statistics",
    "random_keys",
    "statistic_names",
]
