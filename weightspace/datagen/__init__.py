"""From a recipe to a zoo: populations trained in parallel, in shards that resume."""

from weightspace.datagen._fit import FitResult, fit_networks
from weightspace.datagen._generate import GenerateReport, generate, join_shards
from weightspace.datagen._inrs import INRRecipe
from weightspace.datagen._plan import Plan, plan
from weightspace.datagen._protocol import PROTOCOLS, Protocol
from weightspace.datagen._recipe import RECIPES, Recipe, load_recipe, parse_recipe, recipe_names, recipe_text
from weightspace.datagen.classifiers import (
    COPIES,
    FAMILIES,
    ClassifierRecipe,
    TrainingConfig,
    prune,
    quantise,
)

__all__ = [
    "COPIES",
    "FAMILIES",
    "PROTOCOLS",
    "RECIPES",
    "ClassifierRecipe",
    "FitResult",
    "GenerateReport",
    "INRRecipe",
    "Plan",
    "Protocol",
    "Recipe",
    "TrainingConfig",
    "fit_networks",
    "generate",
    "join_shards",
    "load_recipe",
    "parse_recipe",
    "plan",
    "prune",
    "quantise",
    "recipe_names",
    "recipe_text",
]
