"""The small networks that zoos are made of: plain ``nn.Module`` classes that know no other room."""

from weightspace.nets._batched import architecture_of, build, coordinate_grid, evaluate_batch
from weightspace.nets._mlp import ACTIVATIONS, MLP, Activation

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Activation",
    "architecture_of",
    "build",
    "coordinate_grid",
    "evaluate_batch",
]
