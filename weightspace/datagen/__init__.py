"""From a recipe to a zoo: populations trained in parallel, in shards that resume."""

from weightspace.datagen._fit import FitResult, fit_networks
from weightspace.datagen._generate import GenerateReport, generate
from weightspace.datagen._protocol import PROTOCOLS, Protocol
from weightspace.datagen._recipe import Recipe, load_recipe, recipe_names, recipe_text

__all__ = [
    "PROTOCOLS",
    "FitResult",
    "GenerateReport",
    "Protocol",
    "Recipe",
    "fit_networks",
    "generate",
    "load_recipe",
    "recipe_names",
    "recipe_text",
]
