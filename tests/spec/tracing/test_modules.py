"""Modules as people write them: noise, memory that is shared, sizes that depend on data, empty layers."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weightspace import WeightSpec
from weightspace.errors import SpecError, SpecWarning
from weightspace.spec import check_operators, trace, verify


def groups(spec):
    """Size of every group, those within others in brackets."""
    return " ".join(f"({group.size})" if group.within else str(group.size) for group in spec.groups.values())


def quiet(module, inputs, **options):
    """The verified spec of a module about which there is nothing to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpecWarning)
        return trace(module, inputs, **options)


class Between(nn.Module):
    """linear, function, linear."""

    def __init__(self, body, width=6):
        super().__init__()
        self.first, self.last, self.body = nn.Linear(3, 6), nn.Linear(width, 2), body

    def forward(self, x):
        return self.last(self.body(self.first(x)))


# -- modes -------------------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """A low-rank update that joins the weight in evaluation mode, as in loralib."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.down, self.up = (
            nn.Parameter(torch.randn(2, in_features)),
            nn.Parameter(torch.randn(out_features, 2)),
        )
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.weight if self.merged else self.weight + self.up @ self.down, self.bias)


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_change_with_the_mode_are_left_alone(training):
    module = nn.Sequential(Merging(3, 6), nn.ReLU(), Merging(6, 2)).train(training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert groups(quiet(module, torch.randn(4, 3))).startswith("6")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(child.training is training for child in module.modules())
    assert module[0].merged is not training


# -- phases ------------------------------------------------------------------------------------------------


class Grid(nn.Module):
    """Sines on a grid of units, whose biases two groups share."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 5, 3)), nn.Parameter(torch.randn(4, 5))
        self.rows, self.columns = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        hidden = torch.sin(torch.einsum("bi,hci->bhc", x, self.weight) + self.bias)
        return torch.einsum("bhc,h,c->b", hidden, self.rows, self.columns)


def test_a_phase_needs_a_bias_that_no_other_sign_flips():
    """A sign of a row turns the shift of a column round, there alone: together they would be no group."""
    spec = quiet(Grid(), torch.randn(4, 3))
    assert [(scaling.group, scaling.kind) for scaling in spec.scalings.values()] == [
        ("hidden0", "sign"),
        ("hidden1", "sign"),
    ]


# -- noise -------------------------------------------------------------------------------------------------


class Variational(nn.Module):
    """An autoencoder that draws its code."""

    def __init__(self):
        super().__init__()
        self.encode, self.mean, self.scale, self.decode = (
            nn.Linear(*sizes) for sizes in ((3, 6), (6, 4), (6, 4), (4, 3))
        )

    def forward(self, x):
        hidden = self.encode(x).relu()
        mean = self.mean(hidden)
        return self.decode(mean + torch.randn_like(mean) * self.scale(hidden).exp())


NOISE = {
    "randn_like": (Variational(), "6"),
    "native_dropout": (Between(lambda h: F.dropout(h, 0.5)), ""),
    "exponential": (Between(lambda h: F.gumbel_softmax(h, hard=True)), ""),
    "randn": (Between(lambda h: h + torch.randn(h.shape)), ""),
    "rand": (Between(lambda h: h * (torch.rand(h.shape[0], 1) > 0.3)), "6"),
    "rand_like": (Between(lambda h: h * torch.rand_like(h[:1])), ""),
    "rand, less": (Between(lambda h: h * torch.bernoulli(h.sigmoid())), ""),
    "multinomial": (Between(lambda h: h + torch.multinomial(h.exp(), 6)), ""),
    "normal": (Between(lambda h: torch.normal(h, 1.0)), ""),
    "normal_functional": (Between(lambda h: h + torch.empty(4, 6).normal_()), ""),
    "uniform": (Between(lambda h: h + torch.empty(4, 1).uniform_()), "6"),
    "randperm": (Between(lambda h: h[:, torch.randperm(6)]), ""),
    "scaled_dot_product_attention": (
        Between(lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], dropout_p=0.5)[0]),
        "",
    ),
}


@pytest.mark.parametrize("name", NOISE)
def test_nothing_permutes_noise(name):
    module, expected = NOISE[name]
    name = name.split(",")[0]
    inputs = torch.randn(4, 3)
    before = torch.get_rng_state()
    with pytest.warns(SpecWarning, match=f"operator {name} draws random numbers; the units that meet them"):
        spec = WeightSpec.trace(module, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert groups(spec) == expected
    assert verify(spec, module, inputs, draws=1).max_relative_change < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        changes = check_operators(module, inputs)
        assert all(change.change < 1e-10 for change in changes if "empty" not in change.operator)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_in_evaluation_mode_is_no_noise():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    rnn = nn.LSTM(8, 5, 2, dropout=0.3, batch_first=True)
    assert quiet(
        nn.Sequential(layer, nn.Dropout(), nn.AlphaDropout(), nn.RReLU()), torch.randn(2, 4, 8)
    ).groups
    assert quiet(rnn, torch.randn(2, 4, 8), outputs=[0]).groups


# -- attention with masks ----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention between two linear layers, with a mask of padding."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x, mask):
        hidden = self.first(x)
        return self.last(self.attention(hidden, hidden, hidden, key_padding_mask=mask)[0])


class Encoder(nn.Module):
    """An encoder layer with a mask of padding."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x, mask):
        return self.last(self.layer(self.first(x), src_key_padding_mask=mask))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Attention(), "8 2 (4) (4) 8"),
        (Attention(add_bias_kv=True), "8 2 (4) (4) 8"),
        (Attention(add_zero_attn=True), "8 2 (4) (4) 8"),
        (Encoder(), "8 2 (4) (4) 16"),
    ],
)
def test_a_mask_of_padding_leaves_the_heads_free(module, expected):
    mask = torch.tensor([[False] * 4, [False, False, True, True]])
    assert groups(quiet(module, (torch.randn(2, 4, 3), mask))) == expected


# -- memory and sizes --------------------------------------------------------------------------------------


def test_parameters_that_share_all_their_memory_are_tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = nn.Parameter(first.weight.data)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(4, 2))
    spec = quiet(module, torch.randn(5, 3))
    assert spec.tensors["2.weight"].aliases == ("4.weight",)
    assert "4.weight" not in spec.tensors
    assert groups(spec) == "4"
    inputs = torch.randn(5, 3)
    before = module(inputs)
    module.load_state_dict(spec.act(spec.random_element(symmetries=("permutation",)), module.state_dict()))
    torch.testing.assert_close(module(inputs), before)


def test_parameters_that_share_a_part_of_their_memory_are_refused():
    whole = torch.randn(8, 3)
    module = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 3))
    module[0].weight = nn.Parameter(whole)
    module[1].weight = nn.Parameter(whole.T)
    with pytest.raises(SpecError, match=r"parameters '0.weight' and '1.weight' share a part of their memory"):
        WeightSpec.trace(module, torch.randn(4, 3))


def test_parts_of_one_memory_are_tensors_of_their_own():
    flat = torch.randn(6, 5)
    module = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    module[0].weight, module[2].weight = nn.Parameter(flat[:, :3]), nn.Parameter(flat[:, 3:].T)
    assert groups(quiet(module, torch.randn(4, 3))) == "6"


def test_tensors_without_entries_are_constants():
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 0), nn.ReLU(), nn.Linear(0, 2))
    with pytest.warns(SpecWarning, match="nothing was verified"):
        spec = trace(module, torch.randn(4, 3))
    assert set(spec.tensors) == {"0.weight", "0.bias", "4.bias"}
    assert set(spec.constants) == {"2.weight", "2.bias", "4.weight"}
    assert set(spec.act(spec.random_element(), module.state_dict())) == set(module.state_dict())


class Appended(nn.Module):
    """A parameter without rows beside hidden ones."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.more = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.zeros(0, 6))

    def forward(self, x):
        return self.last(torch.cat([self.first(x), self.more]).relu())


def test_what_is_empty_fixes_nothing_beside_it():
    assert groups(quiet(Appended(), torch.randn(4, 3))) == "6"


class Sparse(nn.Module):
    """Each expert sees the items that chose it, however many."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(3, 7), nn.Linear(7, 2), nn.Linear(3, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3)) for _ in range(2)
        )

    def forward(self, x):
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(x[rows]))
        return self.last(self.first(x + out).relu())


def test_what_has_a_size_that_depends_on_data_is_fixed():
    with pytest.warns(SpecWarning, match="makes a tensor whose size depends on data") as caught:
        spec = WeightSpec.trace(Sparse(), torch.randn(9, 3))
    assert len(caught) == 1
    assert groups(spec) == "7"
    assert "size that depends on data" in spec.provenance.pinned["experts.0.0.weight"][0]


class Rotary(nn.Module):
    """Attention whose queries and keys are turned by their positions, by nothing at position 0."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.last = (nn.Linear(3, 8) for _ in range(4))

    def turned(self, h):
        angle = torch.arange(h.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
        return h * angle.cos() + torch.cat([-h[..., 4:], h[..., :4]], -1) * angle.sin()

    def forward(self, x):
        query, key = self.turned(self.query(x)), self.turned(self.key(x))
        return F.scaled_dot_product_attention(query, key, self.value(x)).square().sum(-1)


def test_a_size_of_one_that_hides_something_is_named():
    with pytest.warns(
        SpecWarning, match="axis 1 of input x has size 2 instead of 1; add such an example to more"
    ):
        assert groups(WeightSpec.trace(Rotary(), torch.randn(2, 1, 3))) == "4 8"
    assert groups(quiet(Rotary(), torch.randn(2, 1, 3), more_inputs=[torch.randn(2, 5, 3)])) == "8"


def test_a_size_of_one_that_hides_nothing_is_not():
    image = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    assert groups(quiet(image, torch.zeros(1, 1, 4, 4))) == "4"
    assert groups(quiet(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)), torch.zeros(1, 1))) == "5"


class Gated(nn.Module):
    """A table of many experts of which two are chosen."""

    def __init__(self, experts):
        super().__init__()
        self.gate, self.up = nn.Parameter(torch.randn(experts, 3)), nn.Parameter(torch.randn(experts, 3, 4))
        self.down = nn.Parameter(torch.randn(experts, 4, 2))

    def forward(self, x):
        values, chosen = torch.topk(x @ self.gate.T, 2)
        gates = torch.zeros(len(x), len(self.gate)).scatter(-1, chosen, values.softmax(-1))
        hidden = torch.einsum("bd,edh->beh", x, self.up).relu()
        return torch.einsum("beh,eho,be->bo", hidden, self.down, gates)


def test_more_copies_of_a_group_than_are_made_are_named():
    with pytest.warns(
        SpecWarning, match="4 units could move differently for each of 65 fixed indices, more than 64"
    ):
        assert groups(WeightSpec.trace(Gated(65), torch.randn(4, 3))) == "4"
    assert groups(quiet(Gated(3), torch.randn(4, 3))) == "4 4 4"


# -- arguments ---------------------------------------------------------------------------------------------


class Moded(nn.Module):
    """An argument that is no tensor, whose value is the name of one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, mode, x, factor=1.0, more=None):
        hidden = self.first(x) * factor
        hidden = hidden.relu() if mode == "x" else hidden.tanh()
        return self.last(hidden if more is None else hidden + self.first(more["p"][0]))


def test_arguments_need_not_be_tensors():
    x = torch.randn(4, 3)
    assert groups(quiet(Moded(), ("x", x, 2.0, {"p": [x]}))) == "6"
    named = quiet(Moded(), {"mode": "y", "x": x, "factor": 2.0})
    assert [scaling.kind for scaling in named.scalings.values()] == ["sign"]


def test_packed_weights_beside_tensors_are_refused_in_words():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)), {nn.Linear})
        with pytest.raises(SpecError, match="Sequential cannot be exported"):
            WeightSpec.trace(module, torch.randn(4, 3))
