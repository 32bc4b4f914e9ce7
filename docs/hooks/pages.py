"""Fills the pages that are made from the code, so that no second copy of anything is kept in docs/.

A line ``<!-- generated: NAME -->`` in a page is replaced by what the function of that name below returns.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

MARK = re.compile(r"^<!-- generated: (?P<name>[a-z-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return fill(markdown)


def fill(markdown: str) -> str:
    return MARK.sub(lambda mark: GENERATORS[mark["name"]](), markdown)


# -- files and commands ------------------------------------------------------------------------------------


def file_format() -> str:
    return (resources.files("weightspace.zoo") / "FORMAT.md").read_text(encoding="utf-8")


def commands() -> str:
    """The help of every subcommand, as the command itself prints it."""
    import typer

    from weightspace.cli import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        context = command.make_context(
            f"weightspace {name}", [], resilient_parsing=True, terminal_width=96, max_content_width=96
        )
        parts.append(f"## weightspace {name}\n\n```text\n{command.get_help(context).strip()}\n```")
    return "\n\n".join(parts)


def traced_networks() -> str:
    """The table that ``benchmarks/tracing.py`` wrote, and the command and versions below it."""
    return _results("tracing")


# -- tables from the registries and the configurations -----------------------------------------------------


def recipes() -> str:
    from weightspace.datagen import load_recipe, recipe_names

    rows = [(f"`{name}`", load_recipe(name).description, load_recipe(name).paper) for name in recipe_names()]
    return _table(("recipe", "what it makes", "paper"), rows)


def recipe_fields() -> str:
    from weightspace.datagen import INRRecipe

    return _fields(INRRecipe)


def network_fields() -> str:
    from weightspace.datagen import INRRecipe

    return _fields(INRRecipe.model_fields["network"].annotation, "network.")


def protocol_fields() -> str:
    from weightspace.datagen import Protocol

    return _fields(Protocol, "protocol.")


def split_fields() -> str:
    from weightspace.datagen import INRRecipe

    return _fields(INRRecipe.model_fields["split"].annotation, "split.")


def protocols() -> str:
    from weightspace.datagen import PROTOCOLS, Protocol

    presets = {name: Protocol.model_validate(name) for name in PROTOCOLS}
    fields = [field for field in Protocol.model_fields if field != "preset"]
    rows = [
        (f"`{field}`", *(f"`{getattr(preset, field)}`" for preset in presets.values())) for field in fields
    ]
    return _table(("field", *(f"`{name}`" for name in presets)), rows)


def sources() -> str:
    from weightspace.datagen.sources import SOURCES

    parts = [
        (f"`{kind}`", _summary(cls), ", ".join(f"`{f}`" for f in cls.model_fields))
        for kind, cls in SOURCES.items()
    ]
    return _table(("kind", "what it reads", "its fields"), parts)


def families() -> str:
    from weightspace.datagen import FAMILIES

    parts = [f"`{kind}`: {_summary(cls)}\n\n{_fields(cls)}" for kind, cls in FAMILIES.items()]
    return "\n\n".join(parts)


def copies() -> str:
    from weightspace.datagen import COPIES

    parts = [
        (f"`{kind}`", _summary(cls), ", ".join(f"`{f}`" for f in cls.model_fields))
        for kind, cls in COPIES.items()
    ]
    return _table(("kind", "what is done", "its fields"), parts)


def classifier_fields() -> str:
    from weightspace.datagen import ClassifierRecipe

    return _fields(ClassifierRecipe)


def data_fields() -> str:
    from weightspace.datagen import ClassifierRecipe

    return _fields(ClassifierRecipe.model_fields["data"].annotation, "data.")


def hyperparameter_fields() -> str:
    from weightspace.datagen import TrainingConfig

    return _fields(TrainingConfig, "training.")


def cards() -> str:
    """The table that ``benchmarks/recipe_cards.py`` wrote, and how it was measured."""
    return _results("recipe_cards")


def augmentation_study() -> str:
    """The tables that ``benchmarks/augmentation_study.py`` wrote, and how they were measured."""
    return f"{_results('augmentation_study')}\n\n{_results('augmentation_study_20')}"


def alignment_study() -> str:
    """The tables that ``benchmarks/alignment_study.py`` wrote, and how they were measured."""
    return _results("alignment_study")


def matchers() -> str:
    from weightspace.align import MATCHERS

    rows = [
        (
            f"`{name}`",
            entry.effect.rstrip("."),
            "all together" if entry.together else "pairs, batched" if entry.batched else "pairs",
            ", ".join(entry.needs) or "nothing",
            ", ".join(f"`{option}={default}`" for option, default in entry.options.items()),
            entry.paper,
        )
        for name, entry in MATCHERS.items()
    ]
    return _table(("method", "what it does", "moves", "needs", "options", "paper"), rows)


def mergers() -> str:
    from weightspace.merge import MERGERS

    rows = []
    for name, entry in MERGERS.items():
        statistics = {"fisher": "Fisher information", "grams": "Gram matrices", None: ""}[entry.statistics]
        needs = filter(None, ["base" if entry.base else "", statistics, "score" if entry.score else ""])
        options = (
            f"`{option}`" if default in (None, ...) else f"`{option}={default}`"
            for option, default in entry.options.items()
        )
        effect = re.sub(r"``(.+?)``", r"`\1`", entry.effect.rstrip("."))
        rows.append((f"`{name}`", effect, ", ".join(needs) or "nothing", ", ".join(options), entry.paper))
    return _table(("method", "what it does", "needs", "options", "paper"), rows)


def embeddings() -> str:
    """The table that ``benchmarks/contrastive.py`` wrote, and how it was measured."""
    return _results("contrastive")


def _results(name: str) -> str:
    """What a benchmark program wrote, without its title."""
    results = Path(__file__).parents[2] / "benchmarks" / "results" / f"{name}.md"
    return results.read_text(encoding="utf-8").partition("\n\n")[2].strip()


def models() -> str:
    from weightspace.models import MODELS

    rows = [(f"`{name}`", _summary(cls), cls.reads, cls.paper) for name, cls in MODELS.items()]
    return _table(("model", "what it is", "reads weights", "paper"), rows)


def model_options() -> str:
    from weightspace.models import MODELS

    parts = []
    for name, cls in MODELS.items():
        trained = ", ".join(f"`{key}: {value}`" for key, value in cls.training.items())
        parts.append(f"### {name}\n\n{_fields(cls)}\n\nTrained, unless you say otherwise, with {trained}.")
    return "\n\n".join(parts)


def task_options() -> str:
    from weightspace.tasks import TASKS

    parts = [
        (name, _fields(cls.settings, "task.")) for name, cls in TASKS.items() if cls.settings.model_fields
    ]
    return "\n\n".join(f"`{name}`:\n\n{table}" for name, table in parts)


def training_fields() -> str:
    from weightspace.tasks import TrainConfig

    return _fields(TrainConfig)


def augmentations() -> str:
    from weightspace.datasets import AUGMENTATIONS

    rows = [
        (f"`{name}`, `{cls.__name__}`", _summary(cls), _options(cls), cls.keeps, cls.effect, cls.paper)
        for name, cls in AUGMENTATIONS.items()
    ]
    head = ("name, class", "what it does", "options", "keeps the function", "which becomes", "paper")
    return _table(head, rows)


def _options(cls: type) -> str:
    """Options with their defaults, ranges and meanings."""
    parts = []
    for option in inspect.signature(cls, eval_str=True).parameters.values():
        kind, *notes = get_args(option.annotation) or (option.annotation,)
        field = next((note for note in notes if isinstance(note, FieldInfo)), FieldInfo())
        allowed = ", ".join(filter(None, [_choices(kind), _range(field)]))
        meaning = f": {field.description}" if field.description else ""
        parts.append(f"`{option.name}={option.default}`{f', {allowed}' if allowed else ''}{meaning}")
    return "; ".join(parts)


def _choices(kind: Any) -> str:
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else ""


def _range(field: FieldInfo) -> str:
    """``"[0, 1)"``, ``"≥ 1"`` or ``"> 0"``."""
    names = ("ge", "gt", "le", "lt")
    bound = {name: getattr(note, name) for note in field.metadata for name in names if hasattr(note, name)}
    if len(bound) < 2:
        signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
        return "".join(f"{signs[name]} {value:g}" for name, value in bound.items())
    low, high = sorted(bound.values())
    return f"in {'[' if 'ge' in bound else '('}{low:g}, {high:g}{']' if 'le' in bound else ')'}"


def importers() -> str:
    from weightspace.zoo import IMPORTERS

    rows = [
        (f"`{n}`", _summary(cls), cls.expects.replace("*", r"\*"), cls.paper) for n, cls in IMPORTERS.items()
    ]
    return _table(("format", "what it reads", "files", "paper"), rows)


def import_options() -> str:
    from weightspace.zoo import IMPORTERS

    return "\n\n".join(f"`{name}`:\n\n{_fields(cls.options_type)}" for name, cls in IMPORTERS.items())


def exporters() -> str:
    from weightspace.zoo import EXPORTERS

    rows = [(f"`{n}`", _summary(cls), "weights, " + ", ".join(cls.keeps)) for n, cls in EXPORTERS.items()]
    return _table(("format", "what it writes", "keeps"), rows)


def tasks() -> str:
    from weightspace.tasks import TASKS

    rows = [(f"`{name}`", _summary(cls), f"`{cls.monitor}`") for name, cls in TASKS.items()]
    return _table(("task", "what it is", "picks the best epoch by"), rows)


def _fields(model: Any, prefix: str = "") -> str:
    rows = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else f"`{_default(default)}`"
        rows.append((f"`{prefix}{name}`", shown, field.description))
    return _table(("field", "default", "meaning"), rows)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return {None: "null", "": '""'}.get(value, str(value)) if not isinstance(value, dict) else str(value)


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(entry) for entry in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return str("" if value is None else value).replace("|", "\\|")


GENERATORS: dict[str, Callable[[], str]] = {
    "alignment-study": alignment_study,
    "augmentations": augmentations,
    "cards": cards,
    "augmentation-study": augmentation_study,
    "embeddings": embeddings,
    "classifier-fields": classifier_fields,
    "commands": commands,
    "copies": copies,
    "data-fields": data_fields,
    "exporters": exporters,
    "families": families,
    "file-format": file_format,
    "hyperparameter-fields": hyperparameter_fields,
    "import-options": import_options,
    "importers": importers,
    "matchers": matchers,
    "mergers": mergers,
    "model-options": model_options,
    "models": models,
    "network-fields": network_fields,
    "protocol-fields": protocol_fields,
    "protocols": protocols,
    "recipe-fields": recipe_fields,
    "recipes": recipes,
    "sources": sources,
    "split-fields": split_fields,
    "task-options": task_options,
    "tasks": tasks,
    "traced-networks": traced_networks,
    "training-fields": training_fields,
}
