"""List the built-in recipes, or print one.

Example: weightspace recipes digits-inr > mine.yaml
"""

from __future__ import annotations

from typing import Annotated

import typer

from weightspace.cli._options import Json
from weightspace.cli._output import show


def command(
    name: Annotated[str | None, typer.Argument(help="A recipe to print as YAML.")] = None,
    as_json: Json = False,
) -> None:
    from weightspace.datagen import load_recipe, recipe_names, recipe_text

    if name is not None:
        show(recipe_text(name), load_recipe(name).resolved(), as_json=as_json)
        return
    found = {entry: load_recipe(entry).description for entry in recipe_names()}
    width = max(map(len, found))
    show("\n".join(f"{entry:<{width}}  {text}" for entry, text in found.items()), found, as_json=as_json)
