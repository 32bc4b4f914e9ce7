"""Recipes: everything that decides the content of a zoo, in one validated model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from weightspace.configuration import Registry
from weightspace.datagen.sources import SOURCES, SourceConfig
from weightspace.errors import RecipeError

if TYPE_CHECKING:
    from weightspace.datagen._work import Work
    from weightspace.datagen.sources import Signals

STRICT = ConfigDict(extra="forbid", frozen=True)
DEFAULT_KIND = "inr"


class SplitConfig(BaseModel):
    """How items are divided: a share for validation, one for tests, the rest to learn from."""

    model_config = STRICT

    method: Literal["random", "official"] = Field(
        "random", description="official keeps the data set's own test items as the test split"
    )
    val: float = Field(0.1, ge=0, lt=1, description="share of the items (official: of the training items)")
    test: float = Field(0.2, ge=0, lt=1, description="share of the items (random only)")


def of_kind(registry: Registry[Any], value: Any) -> Any:
    """The configuration that ``{kind: NAME, ...}`` stands for; what is no mapping is left to pydantic.

    Raises:
        ValueError: no such kind.
    """
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in registry:
        raise ValueError(f"kind: expected one of {', '.join(registry)}, found {kind!r}")
    return registry[kind].model_validate(fields)


class Recipe(BaseModel):
    """What all recipes have in common; ``kind: NAME`` in the file says which networks it makes, INRs by default.

    :meth:`resolved` is what the zoo file records.
    """

    model_config = STRICT
    kind: ClassVar[str]
    kinds: ClassVar[dict[str, Registry[Any]]] = {"source": SOURCES}  # fields that are {kind: NAME, ...}
    lists: ClassVar[dict[str, Registry[Any]]] = {}  # fields that are lists of such

    name: str = Field(..., description="of the recipe")
    description: str = Field("", description="one line for `weightspace recipes`")
    paper: str | None = Field(None, description="where this population was published")
    source: SerializeAsAny[SourceConfig] = Field(..., description="the data: {kind: digits | idx, ...}")
    split: SplitConfig = Field(
        default_factory=SplitConfig, description="of the networks in train, val and test"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of stored weights")
    shard: int = Field(256, ge=1, description="networks per shard, the unit of resuming")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")

    @field_validator("source", mode="before")
    @classmethod
    def _source(cls, value: Any) -> Any:
        return of_kind(SOURCES, value)

    def work(self, signals: Signals, device: str) -> Work:
        """What this recipe makes from its data.

        Raises:
            RecipeError: the data do not fit the recipe.
        """
        raise AssertionError(f"{type(self).__name__} makes nothing")

    def document(self) -> dict[str, Any]:
        """As it stands in a file."""
        document = self.model_dump(mode="json")
        for field in self.kinds:
            document[field] = {"kind": getattr(self, field).kind, **document[field]}
        return document if self.kind == DEFAULT_KIND else {"kind": self.kind, **document}

    def resolved(self) -> dict[str, Any]:
        """All that decides the content of the zoo, as JSON; `shard` is left out, as it decides nothing."""
        left_out = ("description", "paper", "shard")
        return {field: value for field, value in self.document().items() if field not in left_out}


RECIPES: Registry[type[Recipe]] = Registry("recipe", "kind")
"""Kinds of recipes; ``@RECIPES.register("kind")`` adds one."""


def parse_recipe(document: Mapping[str, Any]) -> Recipe:
    """The recipe that a mapping of fields describes, of the kind that stands under ``kind``.

    Raises:
        ValidationError: an unknown key or a value out of range (pydantic's).
        RecipeError: an unknown kind of recipe.
    """
    return _model_of(document).model_validate(_fields_of(document))


def _model_of(document: Mapping[str, Any]) -> type[Recipe]:
    kind = document.get("kind", DEFAULT_KIND)
    if not isinstance(kind, str) or kind not in RECIPES:
        raise RecipeError(f"kind: expected one of {', '.join(RECIPES)}, found {kind!r}")
    return RECIPES[kind]


def _fields_of(document: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in document.items() if field != "kind"}


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    folder = resources.files("weightspace.datagen") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def recipe_text(name_or_path: str | Path) -> str:
    """The YAML of a built-in recipe or of a file.

    Raises:
        RecipeError: not found, or not text.
    """
    return _read(str(name_or_path))[1]


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a built-in recipe or a YAML file.

    Args:
        name_or_path: a name from :func:`recipe_names`, or the path of a YAML file.
        overrides: values for fields, nested ones by dotted names (``{"network.w0": 10}``).

    Raises:
        RecipeError: not found, not YAML, an unknown key or a value out of range; the message names the field
            and, for a file, the line.
    """
    place, text = _read(str(name_or_path))
    try:
        document = yaml.safe_load(text)
        root = yaml.compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise RecipeError(f"{place}{line}: not valid YAML ({problem})") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{place}: expected a mapping of fields, found {type(document).__name__}")
    return _overridden(document, overrides or {}, place, root)


def override_recipe(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """A copy of a recipe with some fields changed, nested ones by dotted names.

    Raises:
        RecipeError: an unknown key or a value out of range.
    """
    document = recipe.document()
    if "protocol.preset" in overrides:  # another preset brings its own fields
        document["protocol"] = {}
    return _overridden(document, overrides, f"recipe {recipe.name}", None)


def _overridden(
    document: dict[str, Any], overrides: Mapping[str, Any], place: str, root: yaml.Node | None
) -> Recipe:
    for key, value in overrides.items():
        _set(document, key, value, place)
    try:
        return parse_recipe(document)
    except RecipeError as error:
        line = _line_of(root, ["kind"])
        raise RecipeError(f"{place}{f', line {line}' if line else ''}: {error}") from None
    except ValidationError as error:
        raise RecipeError(f"{place}{_first_problem(error, document, root, overrides)}") from None


def _read(name: str) -> tuple[str, str]:
    if name in recipe_names():
        entry = resources.files("weightspace.datagen") / "recipes" / f"{name}.yaml"
        return f"recipe {name}", entry.read_text(encoding="utf-8")
    path = Path(name)
    if not path.is_file():
        raise RecipeError(
            f"recipe: {name!r} is neither a file nor a built-in recipe ({', '.join(recipe_names())})"
        )
    try:
        return f"recipe {path}", path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error})") from None


def _set(document: dict[str, Any], key: str, value: Any, place: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = document.setdefault(parent, {})
        if isinstance(inner, str) and parent == "protocol":  # a preset's name stands for the preset
            inner = document[parent] = {"preset": inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"{place}: {key!r} cannot be set: {parent!r} is not a mapping")
        document = inner
    document[last] = value


def _first_problem(
    error: ValidationError, document: Mapping[str, Any], root: yaml.Node | None, overrides: Mapping[str, Any]
) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    field = ".".join(location) or "recipe"
    model = _model_of(document)
    overridden = any(f"{field}.".startswith(f"{key}.") for key in overrides)
    line = None if overridden else _line_of(root, location)
    where = f", line {line}" if line else ""
    if problem["type"] == "extra_forbidden":
        return f"{where}: {field}: unknown key; expected one of {', '.join(_known_keys(model, location[:-1], document))}"
    if problem["type"] == "missing":
        return f": {field}: this field is required"
    message = problem["msg"].removeprefix("Value error, ")
    found = problem["input"]
    shown = (
        f", found {found!r}" if isinstance(found, str | int | float | bool) and "found" not in message else ""
    )
    return f"{where}: {field}: {message[0].lower()}{message[1:]}{shown}"


def _known_keys(model: Any, parents: Sequence[str], document: Mapping[str, Any]) -> list[str]:
    if parents and parents[0] in model.kinds:  # its fields depend on its kind, which was found to be known
        return ["kind", *model.kinds[parents[0]][document[parents[0]]["kind"]].model_fields]
    if len(parents) > 1 and parents[0] in model.lists:
        return ["kind", *model.lists[parents[0]][document[parents[0]][int(parents[1])]["kind"]].model_fields]
    if not parents:
        return ["kind", *model.model_fields]
    for parent in parents:
        field = getattr(model, "model_fields", {}).get(parent)
        if field is None:
            break
        # of `TrainingConfig | None`, the first
        model = next(
            (part for part in get_args(field.annotation) if hasattr(part, "model_fields")), field.annotation
        )
    return list(getattr(model, "model_fields", {}))


def _line_of(root: yaml.Node | None, location: Sequence[str]) -> int | None:
    """1-based line at which the innermost known key of a field's location stands."""
    line, node = None, root
    for part in location:
        if not isinstance(node, yaml.MappingNode):
            break
        entry = next(((k, v) for k, v in node.value if k.value == part), None)
        if entry is None:
            break
        line, node = entry[0].start_mark.line + 1, entry[1]
    return line
