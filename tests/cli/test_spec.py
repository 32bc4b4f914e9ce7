"""``weightspace spec``: the user's module from a package or a file, its arguments and inputs, what is printed."""

import json
import sys

import pytest
import torch
from torch import nn

from weightspace.cli._modules import blaming_module, load_module, parse_inputs
from weightspace.errors import ConfigError
from weightspace.spec import WeightSpec

USER_MODULE = '''
import torch
from torch import nn

from sizes import OUT

print("printed while importing")


class Net(nn.Sequential):
    """A user's class."""

    def __init__(self, width=5, activation="relu"):
        print("printed while building")
        act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]()
        super().__init__(nn.Linear(3, width), act, nn.Linear(width, OUT))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens, scale):
        hidden = self.embedding(tokens) * scale.unsqueeze(-1)
        return {"logits": self.head(hidden), "hidden": hidden}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)

    def forward(self, x):
        return self.first(x) if x.sum() > 0 else x


class Factories:
    @staticmethod
    def small():
        return Net(2)


ready = Net(7)
number = 3


def raises(width):
    raise RuntimeError("no weights here\\nand more")


def makes_a_list():
    return [1]


def leaves():
    raise SystemExit(1)


def interrupted():
    raise KeyboardInterrupt
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A user's file beside another that it imports; what it imports is forgotten after the test."""
    (tmp_path / "sizes.py").write_text("OUT = 2\n")
    (tmp_path / "users_nets.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path / "users_nets.py"
    for name in set(sys.modules) - before:
        if name in ("sizes", "users_nets", "_module_users_nets", "broken", "_module_broken"):
            del sys.modules[name]


# -- what is printed ---------------------------------------------------------------------------------------


def test_the_spec_of_a_users_file_is_printed(call, file):
    code, out, err = call(
        "spec", "--module", f"{file}:Net", "--module-args", "width=8", "activation=tanh", "--input", "4,3"
    )
    assert code == 0, err
    assert out.startswith(
        f"{file}:Net: 4 tensors, 50 parameters, 1 group\ntraced with float32[4, 3]\nverified: "
    )
    assert "  hidden0  8 units, tanh, sign flip\n" in out
    assert "  0.weight  [hidden0, 3]\n" in out
    assert "fixed axes, by what fixes them\n" in out
    assert "printed" not in out
    assert "printed while building" in err


def test_json_is_the_spec_with_its_verified_change(document, file):
    arguments = ["spec", "--module", "users_nets:Net", "--module-args", "width=8", "--input", "4,3"]
    found = document(*arguments)
    assert 0 <= found["verified_change"] < 1e-9
    assert set(found) == {"groups", "tensors", "scalings", "provenance", "verified_change"}
    spec = WeightSpec.from_json(json.dumps(found))
    assert {name: tensor.shape for name, tensor in spec.tensors.items()} == {
        name: tuple(tensor.shape)
        for name, tensor in load_module("users_nets:Net", {"width": 8}).state_dict().items()
    }
    assert [group.size for group in spec.groups.values()] == [8]
    assert spec.provenance.inputs == ("float32[4, 3]",)
    assert document(*arguments, "--no-verify")["verified_change"] is None


def test_named_inputs_of_two_sizes_and_outputs(document, file):
    inputs = ["--input", "tokens=int64:4,9:11", "--input", "scale=4,9"]
    more = ["--more-input", "tokens=int64:3,7:11", "--more-input", "scale=3,7"]
    tagger = ["spec", "--module", "users_nets:Tagger", *inputs, *more]
    everything, logits = document(*tagger), document(*tagger, "--outputs", "logits")
    assert everything["groups"] == []
    assert [group["size"] for group in logits["groups"]] == [6]
    assert logits["provenance"]["inputs"] == ["int64[4, 9], float32[4, 9]", "int64[3, 7], float32[3, 7]"]


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_prints_nothing(call, file, option):
    code, out, _ = call("spec", "--module", "users_nets:Net", "--input", "4,3", option)
    assert (code, out) == (0, "")


def test_an_interruption_leaves_nothing(call, file):
    path = file.with_name("spec.png")
    code, out, err = call("spec", "--module", "users_nets:interrupted", "--input", "4,3", "-o", path)
    assert (code, out) == (130, "")
    assert err.endswith("\nweightspace: interrupted; nothing was written\n")
    assert not path.exists()


# -- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml"), (".dot", b"graph "), (".json", b"{")],
)
def test_the_suffix_of_the_output_says_what_is_written(call, file, suffix, start):
    path = file.with_name(f"spec{suffix}")
    arguments = ["spec", "--module", "users_nets:Net", "--input", "4,3", "-o", path]
    code, out, err = call(*arguments)
    assert code == 0, err
    assert out.endswith(f"\n\n{path}\n")
    assert path.read_bytes().startswith(start)
    assert [other.name for other in file.parent.glob(".*.tmp")] == []
    assert call(*arguments)[0] == 2
    assert call(*arguments, "--overwrite")[0] == 0


def test_the_written_json_is_the_spec(document, file):
    path = file.with_name("spec.json")
    found = document("spec", "--module", "users_nets:Net", "--input", "4,3", "-o", path)
    assert WeightSpec.from_json(path.read_text()) == WeightSpec.from_json(json.dumps(found))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spec.gif", "output: expected a name that ends in .png, .pdf, .svg, .dot, .json, found spec.gif"),
        ("there.png", "output: there.png exists already; choose another name or pass --overwrite"),
        ("nowhere/spec.png", "output: directory nowhere does not exist"),
        ("new.png/", "output: expected the name of a file, found the directory new.png/"),
        ("folder.png", "output: expected the name of a file, found the directory folder.png"),
    ],
)
def test_outputs_are_checked_before_the_users_code_runs(refuse, file, name, message):
    file.with_name("there.png").write_text("mine")
    file.with_name("folder.png").mkdir()
    assert refuse("spec", "--module", f"{file}:raises", "--input", "4,3", "-o", name) == message
    assert file.with_name("there.png").read_text() == "mine"


# -- modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "arguments", "width"),
    [
        ("users_nets:Net", {"width": 4}, 4),
        ("users_nets.py:Net", {}, 5),
        ("./users_nets.py:Factories.small", {}, 2),
        ("users_nets:ready", {}, 7),
        ("torch.nn:Linear", {"in_features": 3, "out_features": 9}, 9),
    ],
)
def test_modules_come_from_packages_and_files(file, place, arguments, width):
    before = list(sys.path)
    module = load_module(place, arguments)
    assert isinstance(module, nn.Module)
    assert next(module.parameters()).shape == (width, 3)
    assert sys.path == before


def test_the_seed_decides_the_weights_and_leaves_the_generator_alone(file):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (load_module("users_nets:Net", {}, seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("place", "arguments", "message"),
    [
        ("Net", {}, "--module: expected package.module:factory or path/to/file.py:factory, found 'Net'"),
        ("users_nets:", {}, "--module: expected package.module:factory or path/to/file.py:factory, found"),
        ("no_such.thing:Net", {}, "--module: there is no module no_such, neither installed nor in {folder}"),
        ("torch.no_such:Net", {}, "--module: there is no module torch.no_such, neither installed nor in"),
        ("no_such.py:Net", {}, "--module: file no_such.py not found"),
        ("users_nets:Nett", {}, "--module: users_nets has no Nett; it defines Net, Tagger, Branching, Fact"),
        ("users_nets:number", {}, "--module: users_nets:number should be a class or a function, found a int"),
        (
            "users_nets:ready",
            {"width": 2},
            "--module: users_nets:ready should be a class or a function, found a",
        ),
        (
            "users_nets:makes_a_list",
            {},
            "--module: users_nets:makes_a_list should make a torch.nn.Module, made a",
        ),
        (
            "users_nets:Net",
            {"widht": 3},
            "--module-args: Net got an unexpected keyword argument 'widht'; it takes width=5, activation='relu'",
        ),
        (
            "users_nets:raises",
            {},
            "--module-args: raises missing a required argument: 'width'; it takes width",
        ),
        (
            "users_nets:raises",
            {"width": 1},
            "--module: users_nets:raises failed: RuntimeError: no weights here ({folder}/users_nets.py, line 50)",
        ),
        (
            "users_nets:Net",
            {"width": -1},
            "--module: users_nets:Net failed: RuntimeError: Trying to create tensor with negative dimension -1",
        ),
        (
            "users_nets:leaves",
            {},
            "--module: users_nets:leaves failed: SystemExit: 1 ({folder}/users_nets.py",
        ),
        (
            "broken:Net",
            {},
            "--module: importing broken failed: ModuleNotFoundError: No module named 'not_there'",
        ),
        ("broken.py:Net", {}, "--module: importing broken.py failed: ModuleNotFoundError: No module named"),
    ],
)
def test_modules_that_cannot_be_made(file, place, arguments, message):
    file.with_name("broken.py").write_text("import not_there\n")
    with pytest.raises(ConfigError) as raised:
        load_module(place, arguments)
    assert str(raised.value).startswith(message.format(folder=file.parent))
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_python(file):
    file.with_name("broken.py").write_text("def (:\n")
    with pytest.raises(ConfigError, match=r"importing broken.py failed: SyntaxError: .*broken.py, line 1\)$"):
        load_module("broken.py:Net", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--module", "nothing:Net", "--input", "4,3"], "--module: there is no module nothing"),
        (["--module", "users_nets:Net", "--input", "4x3"], "--input: expected a shape such as 2,3,32,32, "),
        (
            ["--module", "users_nets:Net", "--module-args", "width=8", "tanh", "--input", "4,3"],
            "--module-args: expected KEY=VALUE, found 'tanh'",
        ),
        (
            ["--module", "users_nets:Net", "--module-args", "width=[", "--input", "4,3"],
            "--module-args width: not a valid value: '['",
        ),
        (
            ["--module", "users_nets:Net", "--input", "4,5"],
            "module: Net cannot be exported with these inputs: ",
        ),
        (
            ["--module", "users_nets:Net", "--input", "int64:4,3:5"],
            "--module: users_nets:Net cannot be called with int64[4, 3]: RuntimeError: mat1 and mat2 must have the "
            "same dtype, but got Long and Float",
        ),
        (
            ["--module", "users_nets:Branching", "--input", "4,3"],
            "module: Branching cannot be exported with ",
        ),
        (
            ["--module", "users_nets:Net", "--input", "4,3", "--outputs", "logits"],
            "outputs: the module returns 0",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, file, arguments, message):
    code, out, err = call("spec", *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("printed while")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith(f"weightspace: {message}")


def test_our_own_errors_are_not_blamed_on_the_module():
    net, inputs = nn.Linear(3, 2), [(torch.randn(4, 3),), {"input": torch.randn(2, 3)}]
    with pytest.raises(ZeroDivisionError), blaming_module("here:net", net, inputs):
        _ = 1 / 0
    inputs.append((torch.randn(4, 5),))
    message = r"^--module: here:net cannot be called with float32\[4, 5\]: RuntimeError: mat1 and mat2 shapes"
    with pytest.raises(ConfigError, match=message), blaming_module("here:net", net, inputs):
        _ = 1 / 0


@pytest.mark.parametrize("missing", ["--module", "--input"])
def test_module_and_input_are_required(call, missing):
    given = {"--module": "users_nets:Net", "--input": "4,3"}
    del given[missing]
    code, out, err = call("spec", *(word for pair in given.items() for word in pair))
    assert (code, out) == (2, "")
    assert missing in err


# -- inputs ------------------------------------------------------------------------------------------------


def test_inputs_by_position():
    [(image, tokens, mask, half)] = parse_inputs(["2,3,8,8", "int64:500,2:7", "bool:2,16", "bfloat16:1"])
    assert (image.shape, image.dtype) == ((2, 3, 8, 8), torch.float32)
    assert (tokens.shape, tokens.dtype) == ((500, 2), torch.int64)
    assert set(tokens.flatten().tolist()) == set(range(7))
    assert (mask.shape, mask.dtype) == ((2, 16), torch.bool)
    assert set(mask.flatten().tolist()) == {False, True}
    assert (half.shape, half.dtype) == ((1,), torch.bfloat16)


def test_inputs_by_name_and_further_calls():
    first, second, third = parse_inputs(
        ["a=2,3", "b=int32:2:5"], ["a=4,3", "b=int32:4:5", "a=6,3", "b=int32:6:5"]
    )
    assert [{name: tuple(x.shape) for name, x in call.items()} for call in (first, second, third)] == [
        {"a": (n, 3), "b": (n,)} for n in (2, 4, 6)
    ]


def test_the_seed_decides_the_inputs():
    drawn = [parse_inputs(["2,3"], seed=seed)[0][0] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "--input: expected a shape such as 2,3,32,32, int64:2,16:100 or mask=bool:2,16, found ''"),
        (["2,,3"], "--input: expected a shape such as"),
        (["1=2,3"], "--input: expected a shape such as"),
        (["-2,3"], "--input: expected a shape such as"),
        (
            ["complex64:2"],
            "--input complex64:2: expected a type of float32, float64, .*, bool, found 'complex64'",
        ),
        (["int64:2,16"], "--input int64:2,16: expected a bound, as in int64:2,16:100"),
        (["2,3:5"], "--input 2,3:5: expected no bound for float32"),
        (["2,0"], "--input 2,0: sizes and bound should be at least 1"),
        (["int64:2:0"], "--input int64:2:0: sizes and bound should be at least 1"),
        (["99999999999999999999"], r"--input 9+: no such tensor can be made \(.+\)"),
        (["a=2", "3"], "--input: expected a different name for every input, or no names, found a=2 3"),
        (["a=2", "a=3"], "--input: expected a different name for every input, or no names, found a=2 a=3"),
    ],
)
def test_inputs_that_are_none(texts, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse_inputs(texts)


def test_further_inputs_come_in_full_calls():
    with pytest.raises(ConfigError, match=r"--more-input: expected 2 for each further call, .* found 3"):
        parse_inputs(["2", "3"], ["2", "3", "4"])
    with pytest.raises(ConfigError, match=r"^--more-input: expected a shape"):
        parse_inputs(["2"], ["x"])
