"""Everything that README.md and docs/ tell a reader to type, and what they say will be printed.

A ``python`` block runs; all blocks of a page share a namespace and a folder, in which ``digits.h5`` is a small zoo of
digits. A ``text`` block right after it is what it prints. In ``bash`` blocks every ``weightspace`` command must parse,
its ``--set`` fields must exist, and scripts and examples must be files with those options.
"""

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

import pytest
import typer
import yaml

import weightspace as ws
from weightspace.cli import app
from weightspace.cli._options import parse_settings
from weightspace.datagen import load_recipe, parse_recipe, recipe_names
from weightspace.datagen.sources import SOURCES
from weightspace.datasets import AUGMENTATIONS
from weightspace.merge import MERGERS
from weightspace.models import MODELS
from weightspace.tasks import TASKS, train_config

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
REGISTRIES = (AUGMENTATIONS, MERGERS, MODELS, SOURCES, TASKS)
COMMANDS = typer.main.get_command(app).commands


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int
    follows: int  # characters of white space since the block before; -1 when there is text between


def blocks_of(page: Path) -> list[Block]:
    text, found, end = page.read_text(), [], 0
    for fence in FENCE.finditer(text):
        between = text[end : fence.start()]
        line = text.count("\n", 0, fence.start("body")) + 1
        found.append(Block(fence["language"], fence["body"], line, -1 if between.strip() else len(between)))
        end = fence.end()
    return found


def bash_lines() -> list[tuple[str, list[str]]]:
    """Every line of every bash block: where it stands, and its words."""
    lines = []
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "bash":
                for offset, line in enumerate(block.body.splitlines()):
                    lines.append((f"{page.name}:{block.line + offset}", shlex.split(line, comments=True)))
    return lines


LINES = bash_lines()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo like the one that the pages generate, in a second."""
    path = tmp_path_factory.mktemp("zoo") / "digits.h5"
    ws.generate(
        "digits-inr", path, count=40, views=3, overrides={"protocol.steps": 30}, device="cpu", progress=False
    )
    return path


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is gone after it."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language == "python" for b in blocks_of(p))], ids=lambda p: p.name
)
def test_python_blocks_run_and_print_what_the_page_says(
    page: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(digits, tmp_path)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed, checked = "", 0
    for block in blocks_of(page):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
        elif block.language == "text" and block.follows >= 0 and printed:
            same = OutputChecker().check_output(block.body, printed, ELLIPSIS | NORMALIZE_WHITESPACE)
            assert same, (
                f"{page.name}:{block.line} says\n{block.body}\nbut the block before prints\n{printed}"
            )
            printed, checked = "", checked + 1
    assert checked


@pytest.mark.parametrize(
    ("place", "words"), [line for line in LINES if line[1][:1] == ["weightspace"]], ids=lambda v: str(v)[:60]
)
def test_commands_parse(place: str, words: list[str]) -> None:
    arguments = words[1 : words.index(">")] if ">" in words else words[1:]
    name = arguments[0]
    assert name in COMMANDS, place
    given = COMMANDS[name].make_context(name, arguments[1:]).params
    settings = parse_settings(given.get("settings"))
    if name == "generate" and given["recipe"] in recipe_names():
        load_recipe(given["recipe"], settings)
    elif name == "train":
        named = {name: given[name] for name in ("model", "task", "target")}
        train_config({"zoo": str(given["zoo"]), **named}, settings)
    elif name == "recipes" and given["name"] is not None:
        load_recipe(given["name"])


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        test_commands_parse("here", ["weightspace", "train", "digits.h5", "-o", "run", "--modl", "dws"])
    with pytest.raises(ValueError, match="unknown key"):
        test_commands_parse(
            "here", shlex.split("weightspace generate digits-inr -o a.h5 --set protcol.steps=1")
        )


def test_scripts_and_examples_exist_with_the_options_shown() -> None:
    programs = [(place, words) for place, words in LINES if words[:1] in (["bash"], ["python"])]
    for place, (_, program, *options) in programs:
        path = REPOSITORY / program
        assert path.is_file(), place
        missing = [word for word in options if word.startswith("-") and f'"{word}"' not in path.read_text()]
        assert not missing, place
    assert {words[1] for _, words in programs} >= {"scripts/demo.sh", "scripts/test.sh"}


def test_no_other_program_is_shown() -> None:
    assert {words[0] for _, words in LINES if words} <= {"weightspace", "bash", "python", "pip"}


def test_recipes_in_the_pages_are_valid() -> None:
    texts = [b.body for page in PAGES for b in blocks_of(page) if b.language == "yaml"]
    assert [parse_recipe(yaml.safe_load(text)).name for text in texts]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(FENCE.sub("", page.read_text())):
        target = link["target"].partition("#")[0]
        assert not target or "://" in target or (page.parent / target).exists(), link["target"]


def test_the_readme_lists_every_metanetwork_and_recipe() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    missing = [name for name in [*MODELS, *recipe_names()] if f"| `{name}` |" not in readme]
    assert not missing


# -- pages made from the code ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages():
    location = REPOSITORY / "docs" / "hooks" / "pages.py"
    spec = importlib.util.spec_from_file_location("documentation_pages", location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_generated_part_is_used_and_filled(pages) -> None:
    asked = {mark["name"] for page in PAGES for mark in pages.MARK.finditer(page.read_text())}
    assert asked == set(pages.GENERATORS)
    for page in PAGES:
        assert "<!-- generated" not in pages.fill(page.read_text())


def test_the_command_page_shows_the_help_of_every_command(pages) -> None:
    filled = pages.fill((REPOSITORY / "docs" / "cli.md").read_text())
    for name in COMMANDS:
        assert f"## weightspace {name}\n\n```text\nUsage: weightspace {name} " in filled
    assert filled.count("Example: weightspace") == len(COMMANDS)


def test_the_format_page_is_the_contract_itself(pages) -> None:
    contract = (REPOSITORY / "weightspace" / "zoo" / "FORMAT.md").read_text()
    assert pages.fill((REPOSITORY / "docs" / "file-format.md").read_text()).strip() == contract.strip()


def test_tables_show_what_is_registered(pages) -> None:
    shown = {
        pages.mergers: MERGERS,
        pages.models: MODELS,
        pages.sources: SOURCES,
        pages.tasks: TASKS,
        pages.augmentations: AUGMENTATIONS,
    }
    for table, registry in shown.items():
        lines = table().splitlines()[2:]
        assert [line.split("`")[1] for line in lines] == list(registry)
        assert len({line.count(" | ") for line in lines}) == 1
