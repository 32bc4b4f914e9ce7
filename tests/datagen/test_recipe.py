"""Recipes: every mistake is named with its field and its line."""

import math
import re

import numpy as np
import pytest

from weightspace.datagen import PROTOCOLS, Protocol, load_recipe, parse_recipe, recipe_names, recipe_text
from weightspace.datagen._recipe import override_recipe
from weightspace.datagen.sources import Digits
from weightspace.errors import ConfigError, RecipeError
from weightspace.nets import MLP

PLAIN = "name: mine\nsource: {kind: digits, size: 8}\nprotocol: dws\n"


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_recipe_is_read(tmp_path):
    recipe = load_recipe(write(tmp_path, PLAIN + "network:\n  hidden: [16, 8]\nviews: 3\nseed: 5\n"))
    assert recipe.source == Digits(size=8)
    assert recipe.network.hidden == (16, 8)
    assert (recipe.network.activation, recipe.network.w0) == ("sine", 30.0)
    assert (recipe.protocol.preset, recipe.protocol.output_offset) == ("dws", 0.5)
    assert (recipe.views, recipe.seed, recipe.count) == (3, 5, None)


@pytest.mark.parametrize("name", recipe_names())
def test_built_in_recipes_are_valid_and_described(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe_text(name).startswith(f"name: {name}\n")
    assert recipe.kind in ("inr", "classifier")
    if recipe.kind == "inr":
        assert recipe.protocol.preset in PROTOCOLS
    else:
        assert recipe.count > 0
        assert parse_recipe(recipe.resolved()).resolved() == recipe.resolved()


def test_what_decides_nothing_is_not_recorded():
    recipe = load_recipe("digits-inr")
    resolved = recipe.resolved()
    assert {"description", "paper", "shard"}.isdisjoint(resolved)
    assert resolved["source"] == {"kind": "digits", "size": 28}
    assert resolved["protocol"]["steps"] == 1000
    assert parse_recipe(resolved) == recipe.model_copy(update={"description": "", "paper": None})
    other = load_recipe("digits-inr", {"shard": 7, "description": "x"})
    assert other.resolved() == resolved


MISTAKES = {
    "unknown key": (
        "typo: 1\n",
        ", line 4: typo: unknown key; expected one of kind, name, description, paper, source, split",
    ),
    "nested unknown key": (
        "network:\n  hidden: [8]\n  width: 3\n",
        ", line 6: network.width: unknown key; expected one of hidden, activation, w0",
    ),
    "unknown key of the protocol": (
        "split:\n  method: random\n  train: 0.5\n",
        ", line 6: split.train: unknown key; expected one of method, val, test",
    ),
    "text for a number": ("views: many\n", ", line 4: views: input should be a valid integer"),
    "number for a mapping": ("network: 3\n", ", line 4: network: input should be a valid dictionary"),
    "unknown word": (
        "network: {activation: swish}\n",
        ", line 4: network.activation: input should be 'sine', 'relu', 'tanh' or 'gaussian', found 'swish'",
    ),
    "count 0": ("count: 0\n", ", line 4: count: input should be greater than or equal to 1, found 0"),
    "an empty layer": (
        "network:\n  hidden: [8, 0]\n",
        ", line 5: network.hidden: layer sizes must be at least 1, found 0",
    ),
    "no layers": ("network:\n  hidden: []\n", ", line 5: network.hidden: tuple should have at least 1 item"),
    "negative seed": ("seed: -1\n", ", line 4: seed: input should be greater than or equal to 0, found -1"),
    "share beyond 1": ("split:\n  val: 2\n", ", line 5: split.val: input should be less than 1, found 2"),
    "key that is no text": ("1: 2\n", ", line 4: 1: keys should be strings"),
    "not YAML": ("network: {hidden: [8\nviews: 2\n", ", line "),
    "colon within a value": (
        "paper: a: b\n",
        ", line 4: not valid YAML (mapping values are not allowed here)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_line(mistake, tmp_path):
    text, message = MISTAKES[mistake]
    path = write(tmp_path, PLAIN + text)
    with pytest.raises(RecipeError, match=re.escape(f"recipe {path}{message}")) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


KINDS = "arrays, cifar10, digits, folder, idx, sequences, sines, table"
SOURCES_AND_PROTOCOLS = {
    "source: {kind: video}\nprotocol: dws\n": f"line 2: source: kind: expected one of {KINDS}, found 'video'",
    "source: {kind: [digits]}\nprotocol: dws\n": f"line 2: source: kind: expected one of {KINDS}, found ['digits']",
    "source: {size: 8}\nprotocol: dws\n": f"line 2: source: kind: expected one of {KINDS}, found None",
    "source:\n  kind: digits\n  sise: 8\nprotocol: dws\n": "line 4: source.sise: unknown key",
    "source:\n  kind: digits\n  size: 7\nprotocol: dws\n": "line 4: source.size: input should be greater than",
    "source:\n  kind: sines\n  frequency: {uniform: [2, 1]}\nprotocol: dws\n": (
        "line 4: source.frequency: uniform: expected low <= high, found [2.0, 1.0]"
    ),
    "source:\n  kind: sines\n  frequency: {uniform: [0, 1]}\nprotocol: dws\n": (
        "line 4: source.frequency.uniform.0: input should be greater than 0, found 0"
    ),
    "source: {kind: sines, samples: 9}\nprotocol: dws\n": (
        "line 2: source: frequency: expected less than 4 periods for 9 samples, found 10"
    ),
    "source: {kind: sequences, digits: 1}\nprotocol: dws\n": (
        "line 2: source: count: 2 numbers of 1 digits make 100 questions, found 10000"
    ),
    "source: {kind: table, name: titanic}\nprotocol: dws\n": (
        "line 2: source.name: input should be 'iris', 'wine', 'breast_cancer' or 'diabetes', found 'titanic'"
    ),
    "source: {kind: idx}\nprotocol: dws\n": "source.folder: this field is required",
    "source: {kind: digits}\nprotocol: sgd\n": "line 3: protocol: expected a preset of dws, siren, found 'sgd'",
    "source: {kind: digits}\nprotocol:\n  preset: [dws]\n": "protocol: expected a preset of dws, siren, found ['dws']",
    "source: {kind: digits}\nprotocol:\n  preset: dws\n  step: 9\n": "line 5: protocol.step: unknown key",
    "source: {kind: digits}\nprotocol:\n  preset: dws\n  steps: 0\n": "line 5: protocol.steps: input should be",
    "source: {kind: digits}\n": "protocol: this field is required",
    "protocol: dws\n": "source: this field is required",
}


@pytest.mark.parametrize("text", SOURCES_AND_PROTOCOLS)
def test_mistakes_in_sources_and_protocols(text, tmp_path):
    path = write(tmp_path, "name: mine\n" + text)
    with pytest.raises(RecipeError, match=re.escape(SOURCES_AND_PROTOCOLS[text])) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": expected a mapping of fields, found NoneType"),
        (b"- a\n- b\n", ": expected a mapping of fields, found list"),
        (b"\xff\xfe\x01", ": cannot be read ("),
        (b"name: \x00\n", ": not valid YAML (unacceptable character"),
    ],
)
def test_files_that_hold_no_recipe(content, message, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(RecipeError, match=re.escape(f"recipe {path}{message}")) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_does_not_exist_lists_those_that_do(tmp_path):
    for name in ("cifar-inr", str(tmp_path / "gone.yaml"), str(tmp_path)):
        with pytest.raises(
            RecipeError, match=r"is neither a file nor a built-in recipe \(.*digits-inr, "
        ) as caught:
            load_recipe(name)
        assert repr(name) in str(caught.value)
    assert issubclass(RecipeError, ConfigError)


def test_overrides_reach_nested_fields(tmp_path):
    path = write(tmp_path, PLAIN)
    changes = {"protocol.steps": 7, "network.hidden": [4], "source.size": 9, "seed": 3, "split.val": 0.3}
    recipe = load_recipe(path, changes)
    assert (recipe.protocol.steps, recipe.protocol.preset) == (7, "dws")
    assert recipe.protocol.output_offset == 0.5, "the rest of the preset stays"
    assert (recipe.network.hidden, recipe.source.size, recipe.seed, recipe.split.val) == ((4,), 9, 3, 0.3)
    assert load_recipe(path).protocol.steps == 1000


def test_overrides_of_a_recipe_in_memory_are_those_of_a_file(tmp_path):
    path = write(tmp_path, PLAIN)
    changes = {"protocol.steps": 7, "network.hidden": [4], "source.size": 9, "views": 2}
    assert override_recipe(load_recipe(path), changes) == load_recipe(path, changes)
    siren = override_recipe(load_recipe(path), {"protocol.preset": "siren"})
    assert siren.protocol == Protocol.model_validate("siren")
    with pytest.raises(RecipeError, match="recipe mine: viewz: unknown key; expected one of kind, name,"):
        override_recipe(load_recipe(path), {"viewz": 2})


def test_mistakes_in_overrides_blame_no_line_of_the_file(tmp_path):
    path = write(tmp_path, PLAIN + "views: 2\n")
    cases = {
        "views": (0, ": views: input should be greater than or equal to 1, found 0"),
        "protocol.speed": (3, ": protocol.speed: unknown key; expected one of preset,"),
        "name.first": ("x", ": 'name.first' cannot be set: 'name' is not a mapping"),
    }
    for key, (value, message) in cases.items():
        with pytest.raises(RecipeError, match=re.escape(f"recipe {path}{message}")):
            load_recipe(path, {key: value})


def test_presets_and_what_overrides_them():
    assert Protocol.model_validate("siren").first_layer == "siren"
    changed = Protocol.model_validate({"preset": "dws", "output_offset": 0.0, "target_psnr": None})
    assert (changed.bias, changed.output_offset, changed.target_psnr) == ("zero", 0.0, None)


def test_initial_bounds_are_the_formulas_of_the_papers():
    net = MLP((2, 16, 9, 3), w0=20.0)
    dws = Protocol.model_validate("dws").initial_bounds(net)
    parts = np.split(dws, np.cumsum([32, 16, 144, 9, 27]))
    fan_in = {0: 2, 2: 16, 4: 9}
    for at, part in enumerate(parts):
        expected = math.sqrt(6 / fan_in[at]) / 20 if at in fan_in else 0.0
        np.testing.assert_allclose(part, expected, rtol=1e-6)
    siren = np.split(Protocol.model_validate("siren").initial_bounds(net), np.cumsum([32, 16, 144, 9, 27]))
    expected = [1 / 2, 0, math.sqrt(6 / 16) / 20, 0, math.sqrt(6 / 9) / 20, 0]
    for part, bound in zip(siren, expected, strict=True):
        np.testing.assert_allclose(part, bound, rtol=1e-6)
    uniform = Protocol.model_validate({"preset": "siren", "bias": "uniform"}).initial_bounds(net)
    for part, bound in zip(np.split(uniform, np.cumsum([32, 16, 144, 9, 27]))[1::2], [2, 16, 9], strict=True):
        np.testing.assert_allclose(part, bound**-0.5, rtol=1e-6)
    assert siren[5].shape == (3,)
    assert dws.dtype == np.float32


def test_bounds_of_an_activation_without_frequency():
    bounds = Protocol.model_validate("dws").initial_bounds(MLP((3, 4, 1), activation="tanh"))
    np.testing.assert_allclose(bounds[:12], math.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(bounds[16:20], math.sqrt(1.5), rtol=1e-6)
