"""Whole networks: what is found in each, and that nothing else happens to their outputs."""

import functools
import importlib.util
import warnings

import pytest
import torch
from torch import nn

from weightspace import WeightSpec
from weightspace.errors import SpecError, SpecWarning
from weightspace.spec import check_operators, trace, verify
from weightspace.spec.tracing._derive import _check_arguments
from weightspace.spec.tracing._program import _wanted
from weightspace.testing import networks

# name and size of every group, in the order of the forward pass; missed_symmetries finds no other
GROUPS = {
    "mlp": "hidden0:8 hidden1:7 hidden2:6",
    "siren": "hidden0:9 hidden1:8",
    "mlp_tanh": "hidden0:8 hidden1:7",
    "mlp_gaussian": "hidden0:8 hidden1:7",
    "weight_norm_mlp": "hidden0:8 hidden1:7",
    "norm_free_residual": "hidden0:7 hidden1:9 hidden2:8",
    "rms_norm_residual": "hidden0:7 hidden1:9 hidden2:8",
    "tied_autoencoder": "hidden0:8 hidden1:5",
    "mixture_of_experts": "hidden0:7 blocks0:3 features0:6 hidden1:7",
    "bilinear": "hidden0:7 hidden1:6 hidden2:5",
    "deep_sets": "hidden0:8 hidden1:7 hidden2:6",
    "text_classifier": "hidden0:8 hidden1:6",
    "mlp_mixer": "hidden0:8 hidden1:7 hidden2:10 hidden3:9 hidden4:11",
    "lenet": "hidden0:6 hidden1:8 hidden2:14 hidden3:12",
    "vgg_flatten": "hidden0:6 hidden1:7 hidden2:8 hidden3:12 hidden4:11",
    "resnet18": (
        "hidden0:5 hidden1:6 hidden2:8 hidden3:10 hidden4:7 hidden5:12 hidden6:13 hidden7:9 hidden8:14 "
        "hidden9:15 hidden10:11 hidden11:16"
    ),
    "resnet50_tiny": (
        "hidden0:5 hidden1:6 hidden2:6 hidden3:11 hidden4:6 hidden5:6 hidden6:6 hidden7:6 hidden8:7 "
        "hidden9:7 hidden10:13 hidden11:7 hidden12:7 hidden13:8 hidden14:8 hidden15:15 hidden16:8 "
        "hidden17:8 hidden18:9 hidden19:9 hidden20:17 hidden21:9 hidden22:9"
    ),
    "resnext": (
        "hidden0:5 blocks0:3 features0:4 features1:4 hidden1:7 blocks1:4 features2:5 features3:5 "
        "hidden2:9 blocks2:3 features4:6 features5:6"
    ),
    "densenet": (
        "hidden0:7 hidden1:8 hidden2:4 hidden3:9 hidden4:5 hidden5:10 hidden6:12 hidden7:3 hidden8:14 "
        "hidden9:6"
    ),
    "squeeze_excitation": "hidden0:7 hidden1:5 hidden2:8 hidden3:6",
    "mobilenet_v2": "hidden0:6 hidden1:12 hidden2:7 hidden3:14 hidden4:15 hidden5:8 hidden6:16",
    "mobilenet_v3": (
        "hidden0:6 hidden1:12 hidden2:4 hidden3:7 hidden4:14 hidden5:5 hidden6:15 hidden7:9 hidden8:8 "
        "hidden9:16"
    ),
    "unet": (
        "hidden0:6 hidden1:5 hidden2:8 hidden3:7 hidden4:10 hidden5:9 hidden6:11 hidden7:13 hidden8:12 "
        "hidden9:14 hidden10:15 hidden11:16"
    ),
    "unet_interpolated": (
        "hidden0:6 hidden1:5 hidden2:8 hidden3:7 hidden4:10 hidden5:9 hidden6:11 hidden7:13 hidden8:12 "
        "hidden9:14 hidden10:15 hidden11:16"
    ),
    "convnext": "hidden0:7 hidden1:12 hidden2:13 hidden3:9 hidden4:14",
    "autoencoder": "hidden0:6 hidden1:8 hidden2:7",
    "conv1d": "blocks0:2 features0:3 features1:4 features2:5 hidden0:7",
    "conv3d": "hidden0:6 hidden1:8",
    "prelu": "hidden0:7 hidden1:6 hidden2:8",
    "group_norm": "blocks0:3 features0:4 blocks1:2 features1:5",
    "instance_norm": "hidden0:7 hidden1:6",
    "pixel_shuffle": "hidden0:7 hidden1:5",
    "vit": (
        "hidden0:14 heads0:2 features0:7 features1:7 hidden1:18 heads1:2 features2:7 features3:7 hidden2:19"
    ),
    "gpt2": (
        "hidden0:10 heads0:2 features0:5 features1:5 hidden1:17 heads1:2 features2:5 features3:5 hidden2:16"
    ),
    "llama": "hidden0:14 heads0:3 heads1:2 features0:8 hidden1:17 heads2:3 heads3:2 features1:8 hidden2:16",
    "multihead_attention": "heads0:3 features0:5 features1:5",
    "multihead_attention_weights": "heads0:3 features0:5 features1:5",
    "cross_attention": "heads0:3 features0:5 features1:5",
    "transformer_encoder": (
        "hidden0:15 heads0:3 features0:5 features1:5 hidden1:19 heads1:3 features2:5 features3:5 hidden2:19"
    ),
    "transformer_decoder": (
        "hidden0:15 hidden1:15 heads0:3 features0:5 features1:5 heads1:3 features2:5 features3:5 "
        "hidden2:19 heads2:3 features4:5 features5:5 heads3:3 features6:5 features7:5 hidden3:19"
    ),
    "gru": "hidden0:5 hidden1:5 hidden2:5 hidden3:5",
    "lstm": "hidden0:5 hidden1:5 hidden2:5 hidden3:5",
    "rnn": "hidden0:5 hidden1:5 hidden2:5 hidden3:5",
    "rnn_relu": "hidden0:5 hidden1:5",
    "gru_cell": "hidden0:5",
}
FOUND_IN_TRANSFORMERS = {
    "hf_bert": (
        "hidden0:15 heads0:3 features0:5 features1:5 hidden1:17 heads1:3 features2:5 features3:5 hidden2:17"
    ),
    "hf_distilbert": (
        "hidden0:15 heads0:3 features0:5 features1:5 hidden1:17 heads1:3 features2:5 features3:5 "
        "hidden2:17 hidden3:15"
    ),
    "hf_gpt2": (
        "hidden0:15 heads0:3 features0:5 features1:5 hidden1:17 heads1:3 features2:5 features3:5 hidden2:17"
    ),
    "hf_opt": (
        "hidden0:8 hidden1:15 heads0:3 features0:5 features1:5 hidden2:17 heads1:3 features2:5 "
        "features3:5 hidden3:17"
    ),
    "hf_llama": (
        "hidden0:18 heads0:3 heads1:2 features0:8 hidden1:17 heads2:3 heads3:2 features1:8 hidden2:17"
    ),
    "hf_qwen2": (
        "hidden0:24 heads0:3 heads1:2 features0:4 hidden1:17 heads2:3 heads3:2 features1:4 hidden2:17"
    ),
    "hf_gpt_neox": (
        "hidden0:24 heads0:3 features0:4 features1:8 hidden1:17 heads1:3 features2:4 features3:8 hidden2:17"
    ),
    "hf_t5": (
        "hidden0:14 heads0:3 features0:5 features1:5 hidden1:17 features2:5 features3:5 hidden2:17 "
        "heads1:3 features4:5 features5:5 heads2:3 features6:5 features7:5 hidden3:17 features8:5 "
        "features9:5 heads3:3 features10:5 features11:5 hidden4:17"
    ),
    "hf_whisper": (
        "hidden0:18 hidden1:18 heads0:3 features0:6 features1:6 hidden2:17 hidden3:18 heads1:3 "
        "features2:6 features3:6 heads2:3 features4:6 features5:6 hidden4:16"
    ),
    "hf_vit": (
        "hidden0:15 heads0:3 features0:5 features1:5 hidden1:17 heads1:3 features2:5 features3:5 hidden2:17"
    ),
    "hf_clip": (
        "hidden0:14 heads0:2 features0:7 features1:7 hidden1:18 hidden2:11 hidden3:15 heads1:3 "
        "features2:5 features3:5 hidden4:17"
    ),
    "hf_convnext": "hidden0:7 hidden1:28 hidden2:28 hidden3:9 hidden4:36",
    "hf_resnet": (
        "hidden0:6 hidden1:3 hidden2:3 hidden3:12 hidden4:3 hidden5:3 hidden6:5 hidden7:5 hidden8:20 "
        "hidden9:7 hidden10:7 hidden11:28"
    ),
    "hf_swin": (
        "hidden0:10 heads0:2 features0:5 features1:5 hidden1:15 heads1:2 features2:5 features3:5 "
        "hidden2:15 hidden3:20 heads2:4 features4:5 features5:5 hidden4:30"
    ),
    "hf_segformer": (
        "hidden0:10 heads0:2 features0:5 hidden1:10 features1:5 hidden2:20 hidden3:14 heads1:2 "
        "features2:7 features3:7 hidden4:42 hidden5:11 hidden6:11 hidden7:11"
    ),
    "hf_mobilenet_v2": (
        "hidden0:6 hidden1:3 hidden2:18 hidden3:5 hidden4:30 hidden5:30 hidden6:6 hidden7:36 hidden8:36 "
        "hidden9:36 hidden10:13 hidden11:78 hidden12:78 hidden13:78 hidden14:78 hidden15:19 hidden16:114 "
        "hidden17:114 hidden18:114 hidden19:32 hidden20:192 hidden21:192 hidden22:192 hidden23:64 "
        "hidden24:256"
    ),
}
INSTALLED = importlib.util.find_spec("transformers") is not None
CASES = networks("core", *(["transformers"] if INSTALLED else []))


@functools.cache
def traced(name):
    case = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpecWarning)
        return WeightSpec.trace(
            case.build(), case.inputs(), more_inputs=[case.more_inputs()], outputs=case.outputs, verify=False
        )


@pytest.mark.parametrize("name", CASES)
def test_the_groups_are_found_and_hold(name):
    case = CASES[name]
    spec = traced(name)
    expected = {**GROUPS, **FOUND_IN_TRANSFORMERS}[name]
    assert " ".join(f"{group.name}:{group.size}" for group in spec.groups.values()) == expected
    module = case.build()
    assert {*spec.tensors, *spec.constants} == set(module.state_dict()) - {
        alias for tensor in spec.tensors.values() for alias in tensor.aliases
    }
    report = verify(spec, module, case.more_inputs(), outputs=case.outputs, draws=1).raise_if_wrong(1e-9)
    assert report.illegal_change > 1e-3
    assert WeightSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("name", CASES)
def test_every_value_moves_as_its_label_says(name):
    case = CASES[name]
    changes = check_operators(case.build(), case.inputs(), outputs=case.outputs)
    assert changes
    assert [change for change in changes if not change.change < 1e-10] == []


@pytest.mark.parametrize("name", networks("core"))
def test_the_symmetries_are_a_group(name):
    """Composing and inverting elements does what applying them one after the other does."""
    spec, generator = traced(name), torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in spec.tensors.items()
    }
    first, second = (
        {
            name: value.double() if value.is_floating_point() else value
            for name, value in spec.random_element((2,), generator=generator).items()
        }
        for _ in range(2)
    )
    moved = spec.act(first, weights)
    together, in_turn = spec.act(spec.compose(second, first), weights), spec.act(second, moved)
    back = spec.act(spec.invert(first), moved)
    for tensor in spec.tensors:
        torch.testing.assert_close(together[tensor], in_turn[tensor], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            back[tensor], weights[tensor].expand_as(back[tensor]), rtol=1e-9, atol=1e-9
        )


def cells(spec, name):
    """Axes of each cell of a tensor, as text."""
    return repr(spec).split(f"  {name} ")[1].splitlines()[0].strip()


def test_a_fused_projection_is_taken_apart():
    spec = traced("vit")
    groups = [group for group in spec.groups.values() if group.within]
    assert {group.within for group in groups} == {("heads0",), ("heads1",)}
    text = cells(spec, next(name for name in spec.tensors if "qkv.weight" in name))
    assert text.count("heads0, features0") + text.count("2, heads0, features0") >= 1
    assert "heads0, features1" in text


def test_rotary_positions_fix_the_features_of_queries_and_keys():
    """Only the heads, in groups that share a key, and the values move."""
    spec = traced("llama")
    assert cells(spec, "blocks.0.attention.query.weight") == "[heads0, heads1, 8, hidden0]"
    assert cells(spec, "blocks.0.attention.key.weight") == "[heads0, 8, hidden0]"
    assert cells(spec, "blocks.0.attention.value.weight") == "[heads0, features0, hidden0]"
    assert cells(spec, "blocks.0.attention.out.weight") == "[hidden0, heads0, heads1, features0]"
    assert spec.groups["heads1"].within == ("heads0",)
    reasons = spec.provenance.pinned["blocks.0.attention.key.weight"]
    assert "blocks.0.attention" in reasons[0]
    assert reasons[1] == ""


def test_a_residual_stream_is_one_group():
    spec = traced("resnet18")
    streams = [
        name for name in spec.groups if sum(name in cells(spec, tensor) for tensor in spec.tensors) > 20
    ]
    assert streams
    statistics = [name for name, tensor in spec.tensors.items() if tensor.kind == "statistic"]
    assert {name.rsplit(".", 1)[1] for name in statistics} == {"running_mean", "running_var"}
    assert all(name.endswith("num_batches_tracked") for name in spec.constants)


def test_the_gates_of_a_recurrent_layer_move_together_and_flip_apart():
    spec = traced("lstm")
    assert cells(spec, "recurrent.weight_hh_l0").count("hidden0, hidden0") >= 1
    (flip,) = [scaling for scaling in spec.scalings.values() if scaling.group == "hidden0"]
    assert flip.kind == "sign"
    # of the four gates in the bias, only that of the candidate, which goes through tanh, changes its sign
    flipped = [place for place in flip.exponents if place.tensor == "recurrent.bias_ih_l0"]
    (place,) = flipped
    assert spec.tensors["recurrent.bias_ih_l0"].cells[place.cell].offset == 2 * 5


def test_tied_tensors_are_one():
    spec = traced("gpt2")
    (tied,) = [tensor for tensor in spec.tensors.values() if tensor.aliases]
    module = CASES["gpt2"].build()
    moved = spec.act(spec.random_element(generator=torch.Generator().manual_seed(0)), module.state_dict())
    first = next(name for name, tensor in spec.tensors.items() if tensor is tied)
    assert torch.equal(moved[first], moved[tied.aliases[0]])
    assert set(moved) == set(module.state_dict())


def test_nothing_is_allocated_for_a_module_on_the_meta_device():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(1024, 65536), nn.ReLU(), nn.Linear(65536, 1024))
    spec = WeightSpec.trace(module, torch.zeros(2, 1024))
    assert [group.size for group in spec.groups.values()] == [65536]
    assert spec.provenance.verified_change is None


def test_what_was_traced_and_measured_is_remembered():
    spec = WeightSpec.trace(nn.Linear(3, 2), torch.zeros(4, 3), more_inputs=[torch.zeros(5, 3)])
    assert spec.provenance.inputs == ("float32[4, 3]", "float32[5, 3]")
    assert spec.provenance.pinned["weight"] == ("output 0", "input input")
    assert 0 <= spec.provenance.verified_change < 1e-12


def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    module[1].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    WeightSpec.trace(module, torch.randn(4, 3))
    assert [child.training for child in module.modules()] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


# -- a wrong spec is never returned, and bad input is named ------------------------------------------------


class Branching(nn.Module):
    """Control flow that depends on data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class Masked(nn.Module):
    """A value with as many entries as there are positive ones."""

    def forward(self, x):
        return x[x > 0]


class Two(nn.Module):
    """Two arguments, both needed."""

    def forward(self, x, scale):
        return x * scale


class Cut(nn.Module):
    """Two outputs, of which one uses a layer by itself."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.side = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 4)

    def forward(self, x):
        hidden = self.body(x).relu()
        return {"logits": self.head(hidden), "side": self.side(hidden)}


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (Branching(), torch.zeros(2, 3), r"Branching cannot be exported .*line \d+, in forward.*WeightSpec.build"),
        (Masked(), torch.randn(2, 3), r"size of output 0 of Masked depends on data .*WeightSpec.build"),
        (nn.Linear(3, 2), torch.zeros(2, 4), r"Linear cannot be exported .*\[2, 4\] X \[3, 2\]; found float32\[2, 4\]$"),
        (nn.Linear(3, 2), (torch.zeros(2, 3), 1), r"Linear cannot be exported .*; found float32\[2, 3\]$"),
        (nn.Linear(3, 2), torch.zeros(0, 3), "outputs of Linear are empty; expected sizes of at least 1"),
        (Two(), torch.zeros(2, 3), r"Two cannot be exported .*'scale'.*found float32\[2, 3\]"),
        (nn.Linear(3, 2, dtype=torch.complex64), torch.zeros(2, 3, dtype=torch.complex64), "'weight' is of type complex64"),
    ],
)  # fmt: skip
def test_what_cannot_be_traced_is_named(module, inputs, message):
    with pytest.raises(SpecError, match=message):
        WeightSpec.trace(module, inputs)


def test_outputs_are_chosen_by_name():
    everything = WeightSpec.trace(Cut(), torch.zeros(2, 3))
    assert cells(everything, "side.weight") == "[4, hidden0]"
    logits = WeightSpec.trace(Cut(), torch.zeros(2, 3), outputs=("logits",))
    assert cells(logits, "side.weight") == "[4, 5]"
    assert set(logits.provenance.pinned["side.weight"]) == {"not used by the outputs"}
    assert WeightSpec.trace(Cut(), torch.zeros(2, 3), outputs="logits") == logits
    with pytest.raises(SpecError, match="outputs: the module returns logits, side, found 'logit'"):
        WeightSpec.trace(Cut(), torch.zeros(2, 3), outputs=("logit",))


def test_outputs_are_chosen_by_position():
    class Pair(Cut):
        def forward(self, x):
            return tuple(super().forward(x).values())

    first = trace(Pair(), torch.zeros(2, 3), outputs=[0])
    assert first == WeightSpec.trace(Cut(), torch.zeros(2, 3), outputs=["logits"])


def test_the_input_that_does_not_fit_is_named():
    inputs = torch.zeros(2, 3)
    with pytest.raises(SpecError, match=r"^more_inputs\[0\]: module: Linear .* found float32\[2, 4\]"):
        WeightSpec.trace(nn.Linear(3, 2), inputs, more_inputs=[torch.zeros(2, 4)])


def test_arguments_of_other_types_are_refused():
    """Called below the public functions, whose annotations the tests enforce."""
    with pytest.raises(SpecError, match=r"module: expected a torch.nn.Module, found function"):
        _check_arguments(lambda x: x, [])
    with pytest.raises(SpecError, match="more_inputs: expected a list of inputs, found Tensor"):
        _check_arguments(nn.Linear(3, 2), torch.zeros(2, 3))
    with pytest.raises(SpecError, match="outputs: expected a name, or a list of names or positions, found 3"):
        _wanted(3)


def test_a_wrong_rule_is_named_and_not_used(monkeypatch):
    """A rule that forgets that roll mixes positions gives a spec that fails its check, at its own node."""
    from weightspace.spec.tracing import RULES

    monkeypatch.setitem(RULES, "roll", lambda trace, x, *rest: x)

    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(torch.roll(self.first(x).relu(), 1, -1).square())

    with pytest.warns(
        SpecWarning, match="rule of operator roll does not hold at roll; .* please report this"
    ):
        spec = WeightSpec.trace(Rolled(), torch.zeros(4, 3))
    assert cells(spec, "first.weight") == "[6, 3]"
    assert spec.provenance.pinned["first.bias"] == ("operator roll, whose rule failed its check",)
    assert spec.provenance.verified_change < 1e-12


def test_a_second_size_shows_what_the_first_one_hides():
    """At length 1 the first five entries are the five units; at length 4 they are steps of two of them."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.layer(x).transpose(1, 2).flatten(1)[:, :5])

    short, long = torch.randn(2, 1, 3), torch.randn(2, 4, 3)
    with pytest.warns(
        SpecWarning, match="fewer symmetries hold where axis 1 of input x has size 2 instead of 1; add"
    ):
        alone = WeightSpec.trace(First(), short)
    assert cells(alone, "layer.weight") == "[hidden0, 3]"
    assert verify(alone, First(), long, draws=1).max_relative_change > 0.01
    both = WeightSpec.trace(First(), short, more_inputs=[long])
    assert cells(both, "head.weight") == "[2, 5]"
    assert WeightSpec.trace(First(), long, more_inputs=[short]) == both
