"""DWS, NFN and UNF on every kind of spec, and against the published layers."""

import copy
import importlib.util
import math
import pickle

import pytest
import torch

from weightspace.errors import ConfigError, SpecError
from weightspace.models import (
    DWS,
    NFN,
    UNF,
    Encoding,
    EquivariantLinear,
    InvariantPool,
    OrbitNorm,
    Orbits,
    SetAttention,
    free_ends,
)
from weightspace.models._stack import ChannelDropout
from weightspace.spec import Group, TensorSpec, WeightSpec
from weightspace.testing import (
    assert_equivariant,
    assert_invariant,
    mixed_spec,
    networks,
    random_weights,
)

TRACED = ("lenet", "vgg_flatten", "resnet18", "gru", "multihead_attention", "transformer_encoder")
MODELS = {
    "dws": (DWS, {"attention": 2, "wide": "encode"}),
    "nfn-hnp": (NFN, {"variant": "hnp", "fourier": 2, "wide": "encode"}),
    "nfn-np": (NFN, {"variant": "np", "wide": "encode"}),
    "unf": (UNF, {}),
}


@pytest.fixture(scope="module")
def specs():
    found = {"mixed": mixed_spec(), "siren": WeightSpec.mlp([2, 5, 6, 1], activation="sine", w0=30.0)}
    cases = networks("core")
    for name in TRACED:
        case = cases[name]
        found[name] = WeightSpec.trace(case.build(), case.inputs(), outputs=case.outputs, verify=False)
    return found


def settled(model, spec):
    """In eval mode, with running statistics that are not the initial ones."""
    for seed in range(2):
        model(random_weights(spec, (4,), seed))
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["siren", "mixed", *TRACED])
def test_numbers_are_invariant_and_weights_equivariant(name, kind, specs):
    spec, (cls, options) = specs[name], MODELS[kind]
    torch.manual_seed(0)
    model = settled(cls(spec, 3, hidden=4, layers=2, **options), spec)
    assert_invariant(model, spec, batch=(1,))
    model = settled(cls(spec, hidden=4, layers=2, **options), spec)
    assert_equivariant(model, spec, batch=(2,))


@pytest.mark.parametrize("pooling", [("attention",), ("attention", "mean", "max")])
def test_attention_pools_invariantly(pooling, specs):
    for name in ("siren", "mixed"):
        torch.manual_seed(0)
        model = UNF(specs[name], 3, hidden=4, layers=1, head_pooling=pooling)
        assert_invariant(settled(model, specs[name]), specs[name])


def test_attention_mixes_the_units_of_one_group():
    """Changing one unit changes all others, and more the more alike they are; matrices are passed over."""
    orbits = Orbits(WeightSpec.mlp([2, 4, 4, 1]))
    torch.manual_seed(0)
    layer = SetAttention(orbits, 1, 4, 2)
    features = {t: torch.randn(1, *orbits.sizes(t), n) for t, n in orbits.entries.items()}
    before = layer(features)
    assert {len(t) for t in before} == {1}
    (first, _) = before
    features[first][0, 0] += 1.0
    after = layer(features)[first]
    assert ((after - before[first]).abs().amax(-1) > 1e-4).all()
    with pytest.raises(ConfigError, match="attention: 4 channels cannot be shared by 3 heads"):
        SetAttention(orbits, 1, 4, 3)


def test_attention_by_hand():
    """One head of one channel: keys and queries are the first entry of a unit, values its second."""
    orbits = Orbits(WeightSpec.mlp([1, 2, 1], bias=False))
    layer = SetAttention(orbits, 1, 1, 1)
    with torch.no_grad():
        layer.into["g0"].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        layer.into["g0"].bias.zero_()
        layer.out["g0"].weight.copy_(torch.tensor([[1.0], [10.0]]))
    ((t, _),) = orbits.entries.items()
    (found,) = layer({t: torch.tensor([[[0.0, 3.0], [1.0, 5.0]]])}).values()
    second = (3 + 5 * math.e) / (1 + math.e)  # scores 0 and 1 of the second unit; 0 and 0 of the first
    torch.testing.assert_close(found, torch.tensor([[[4.0, 40.0], [second, 10 * second]]]))
    with pytest.raises(ConfigError, match="attention: 4 channels cannot be shared by 0 heads"):
        SetAttention(orbits, 1, 4, 0)


class Through(torch.nn.Module):
    """A layer on features as a function of weights, with one channel."""

    def __init__(self, orbits, layer):
        super().__init__()
        self.orbits, self.layer = orbits, layer

    def forward(self, weights):
        features = self.orbits.gather(weights)
        out = self.orbits.scatter({**features, **self.layer(features)})
        return {name: tensor[..., 0] for name, tensor in out.items()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["mixed", "lenet", "resnet18", "gru", "transformer_encoder"])
def test_each_layer_by_itself(name, batch, specs):
    spec, _ = free_ends(specs[name], units=False, wide=16)
    orbits = Orbits(spec)
    torch.manual_seed(0)
    norm = OrbitNorm(orbits, 1).eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    layers = [norm, SetAttention(orbits, 1, 1, 1), EquivariantLinear(orbits, 1, 1)]
    for layer in layers:
        assert_equivariant(Through(orbits, layer), spec, batch=(batch,))
    pool = InvariantPool(orbits, 1, ("mean", "max", "sum", "attention"))
    assert_invariant(torch.nn.Sequential(Gather(orbits), pool), spec, batch=(batch,))


class Gather(torch.nn.Module):
    def __init__(self, orbits):
        super().__init__()
        self.orbits = orbits

    def forward(self, weights):
        return self.orbits.gather(weights)


@pytest.mark.parametrize("training", [True, False])
def test_the_norm_is_that_of_every_channel_over_positions(training):
    spec = mixed_spec()
    orbits = Orbits(spec)
    norm = OrbitNorm(orbits, 2)
    plain = {orbits.key(t): torch.nn.BatchNorm1d(2 * count) for t, count in orbits.entries.items()}
    for seed in range(3):
        torch.manual_seed(seed)
        features = {t: 3 * torch.randn(4, *orbits.sizes(t), 2 * n) + 1 for t, n in orbits.entries.items()}
        found = norm.train(training)(features)
        for t, x in features.items():
            expected = plain[orbits.key(t)].train(training)(x.reshape(-1, x.shape[-1])).view(x.shape)
            torch.testing.assert_close(found[t], expected)


def test_channels_are_dropped_at_all_positions_or_nowhere():
    torch.manual_seed(0)
    layer = ChannelDropout(0.4)
    x = torch.ones(50, 6, 5, 8)
    ratio = layer(x)
    assert torch.equal(ratio, ratio[:, :1, :1].expand_as(ratio))
    kept = ratio[:, 0, 0] > 0
    assert 0.5 < kept.float().mean() < 0.7
    torch.testing.assert_close(ratio[:, 0, 0][kept], torch.full((int(kept.sum()),), 1 / 0.6))
    assert not torch.equal(kept[0], kept[1]), "each network has its own"
    assert layer.eval()(x) is x
    assert isinstance(NFN(WeightSpec.mlp([2, 3, 1]), 2, dropout=0.1).stack.dropout, ChannelDropout)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("out", [3, None])
def test_models_are_copied_pickled_and_run_in_half_precision(kind, out):
    spec, (cls, options) = mixed_spec(), MODELS[kind]
    torch.manual_seed(0)
    model = settled(cls(spec, out, hidden=4, layers=1, **options), spec)
    weights = random_weights(spec, (3,))

    def read(model):
        return model(weights) if out else spec.flatten(model(weights))

    expected = read(model)
    assert torch.equal(read(copy.deepcopy(model)), expected)
    assert torch.equal(read(pickle.loads(pickle.dumps(model))), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(read(model).float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", MODELS)
def test_no_networks_and_no_batch(kind):
    spec, (cls, options) = mixed_spec(), MODELS[kind]
    model = cls(spec, 3, hidden=4, layers=1, **options).eval()
    assert model(random_weights(spec, (0,))).shape == (0, 3)
    edited = cls(spec, hidden=4, layers=1, **options).eval()(random_weights(spec, (0,)))
    assert {name: tuple(w.shape[1:]) for name, w in edited.items()} == {
        name: tensor.shape for name, tensor in spec.tensors.items()
    }
    with pytest.raises(SpecError, match=r"weights: expected one batch axis, found shape \[2, 3\]"):
        model(random_weights(spec, (2, 3)))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["mixed", "gru", "transformer_encoder"])
def test_the_layout_in_memory_does_not_matter(name, kind, specs):
    """Parameters by networks, transposed: what an array of another library often is."""
    spec, (cls, options) = specs[name], MODELS[kind]
    torch.manual_seed(0)
    flat = torch.randn(spec.num_parameters, 3)
    model = cls(spec, 3, hidden=4, layers=1, **options).eval()
    expected = model(spec.unflatten(flat.T.contiguous()))
    torch.testing.assert_close(model(spec.unflatten(flat.T)), expected)


@pytest.mark.parametrize("wide", ["encode", "project"])
@pytest.mark.parametrize("out", [3, None])
def test_all_parameters_are_trained_where_ends_are_wide(wide, out):
    spec = WeightSpec.mlp([20, 5, 4, 18])
    torch.manual_seed(0)
    model = DWS(spec, out, hidden=4, layers=2, wide=wide)
    result = model(random_weights(spec, (8,)))
    values = result if out else torch.cat([w.flatten() for w in result.values()])
    values.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert idle == []


def test_all_parameters_are_trained(specs):
    for cls, options in MODELS.values():
        for out in (3, None):
            torch.manual_seed(0)
            model = cls(specs["siren"], out, hidden=4, layers=2, **options)
            result = model(random_weights(specs["siren"], (8,)))
            values = result if out else torch.cat([w.flatten() for w in result.values()])
            values.square().sum().backward()
            idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
            assert idle == []


# -- encodings ---------------------------------------------------------------------------------------------


def test_ends_become_groups():
    freed, ends = free_ends(WeightSpec.mlp([3, 5, 2]))
    assert ends == {"end0": "input", "end1": "output"}
    groups = {name: [dim.group for dim in tensor.cells[0].dims] for name, tensor in freed.tensors.items()}
    assert groups == {
        "layers.0.weight": ["hidden0", "end0"],
        "layers.0.bias": ["hidden0"],
        "layers.1.weight": ["end1", "hidden0"],
        "layers.1.bias": ["end1"],
    }


def test_ends_do_not_take_the_names_of_groups():
    """``end0`` and ``end2`` are taken; the units of either group stay permutable, and of nothing else."""
    spec = WeightSpec.build(
        [Group("end2", 3), Group("end0", 3)],
        {
            "w": TensorSpec.dense((3, 3), [None, "end0"]),
            "v": TensorSpec.dense((3, 3), ["end0", "end2"]),
            "b": TensorSpec.dense((3,), ["end2"]),
            "c": TensorSpec.dense((4, 3), [None, "end2"]),
        },
    )
    freed, ends = free_ends(spec)
    assert ends == {"end1": "output", "end3": "output"}
    assert {name: group.size for name, group in freed.groups.items()} == {
        "end2": 3,
        "end0": 3,
        "end1": 3,
        "end3": 4,
    }
    torch.manual_seed(0)
    assert_invariant(NFN(spec, 3, variant="np", hidden=4, layers=2).eval(), spec)


def test_many_positions_are_encoded_though_no_axis_is_wide():
    """A patch of 3 x 16 x 16: one of the large axes becomes a group."""
    spec = WeightSpec.build([Group("h", 4)], {"w": TensorSpec.dense((4, 3, 16, 16), ["h", None, None, None])})
    freed, ends = free_ends(spec, units=False, wide=16)
    assert ends == {"end0": "wide"}
    assert [dim.group for dim in freed.tensors["w"].cells[0].dims] == ["h", None, None, "end0"]
    assert free_ends(spec, units=False) == (spec, {})
    torch.manual_seed(0)
    model = UNF(spec, 3, hidden=2, layers=1)
    assert_invariant(settled(model, spec), spec)
    with pytest.raises(
        SpecError, match=r"'w': its axes have 3 x 16 x 16 fixed indices; .* up to 256 .*choose"
    ):
        DWS(spec, 3)
    with pytest.raises(SpecError, match="; choose wide='encode'"):
        DWS(spec, 3, wide="project")


def test_learned_vectors_tell_ends_apart():
    """Without them, input units are exchangeable; with them, they are not."""
    spec = WeightSpec.mlp([3, 5, 2])
    weights = random_weights(spec, (2,))
    swapped = {**weights, "layers.0.weight": weights["layers.0.weight"].flip(-1)}
    torch.manual_seed(0)
    model = NFN(spec, 4, variant="np", hidden=8).eval()
    assert (model(weights) - model(swapped)).abs().max() > 1e-4
    for vector in model.stack.encoding.positions.values():
        torch.nn.init.zeros_(vector)
    torch.testing.assert_close(model(weights), model(swapped))


@pytest.mark.parametrize("wide", ["encode", "project"])
def test_wide_inputs_are_read_in_both_ways(wide):
    spec = WeightSpec.mlp([784, 6, 10])
    torch.manual_seed(0)
    model = settled(DWS(spec, 3, hidden=4, layers=2, wide=wide), spec)
    assert sum(p.numel() for p in model.parameters()) < 120_000
    assert_invariant(model, spec)
    assert_equivariant(settled(DWS(spec, hidden=4, layers=2, wide=wide), spec), spec)
    weights = random_weights(spec, (2,))
    swapped = {**weights, "layers.0.weight": weights["layers.0.weight"].roll(1, -1)}
    assert (model(weights) - model(swapped)).abs().max() > 1e-4


def test_scalars_are_encoded_by_their_frequencies():
    encoding = Encoding(WeightSpec.mlp([1, 2, 1], bias=False), fourier=1, scale=2.0)
    encoding.frequencies.fill_(torch.pi / 2)
    weights = {"layers.0.weight": torch.tensor([[[1.0], [2.0]]]), "layers.1.weight": torch.zeros(1, 1, 2)}
    (features,) = encoding(weights).values()
    expected = [[1.0, 1.0, 0.0, 0.0, 0.0, 1.0], [2.0, 0.0, -1.0, 0.0, 0.0, 1.0]]
    torch.testing.assert_close(features[0], torch.tensor(expected), atol=1e-6, rtol=0)
    bare = Encoding(encoding.orbits.spec, fourier=1, raw=False)
    bare.frequencies.copy_(encoding.frequencies)
    (features,) = bare(weights).values()
    expected = [row[1:3] + row[4:] for row in expected]
    torch.testing.assert_close(features[0], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda s: UNF(s, 3, wide="fold"), ConfigError, "wide in refuse, encode, project .*, found 'fixed', 'fold', 0"),
        (lambda s: Encoding(s, scale=-1.0), ConfigError, "scale > 0, .*, found scale -1.0 and fourier 0"),
        (lambda s: Encoding(s, raw=False), ConfigError, "found scale 1.0 and fourier 0"),
        (lambda s: UNF(s, 3, head_pooling=()), ConfigError, r"pooling: expected some of .*, found \[\]"),
        (lambda s: UNF(s, 3, head_pooling="max"), ConfigError, r"names such as \('max',\), found one string"),
        (lambda s: UNF(s, 0), ConfigError, "sizes: expected out_features .* at least 1, found 0 and 128"),
        (lambda s: NFN(s, 3, head=(4, 0)), ConfigError, "hidden units of at least 1, found 3 and 4, 0"),
        (lambda s: NFN(s, 3, variant="nphnp"), ConfigError, "variant: expected hnp or np, found 'nphnp'"),
        (lambda s: UNF(s, 3, head_pooling=("median",)), ConfigError, "pooling: expected some of mean, max, sum"),
        (lambda s: DWS(WeightSpec.mlp([784, 4, 1]), 3), SpecError, "784 fixed indices; .*choose wide='project'"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build(WeightSpec.mlp([2, 4, 1]))


def test_shared_mixing_takes_fewer_parameters_for_deep_networks(specs):
    full, shared, none = (
        sum(
            p.numel()
            for p in EquivariantLinear(Orbits(specs["resnet18"]), 4, 4, global_mixing=mixing).parameters()
        )
        for mixing in ("full", "shared", "none")
    )
    assert none < full
    assert shared < full / 4


def test_the_pool_reads_diagonals():
    """The trace of a recurrent weight is an invariant of its own."""
    spec = mixed_spec()
    orbits = Orbits(spec)
    pool = InvariantPool(orbits, 1, ("sum",))
    weights = random_weights(spec, (2,))
    found = pool(orbits.gather(weights))
    trace = weights["recurrent"].diagonal(dim1=1, dim2=2).sum(-1)
    assert (found - trace[:, None]).abs().amin(1).max() < 1e-5


# -- the published layers of the package nfn ---------------------------------------------------------------


def copied(ours, theirs, spec, orbits, channels):
    """Give ``ours`` the parameters with which it is ``theirs``: the least squares of a linear map."""
    weights = random_weights(spec, (40, channels), dtype=torch.float64)
    target = theirs(weights)
    names = [name for name, _ in ours.named_parameters()]
    sizes = [p.shape for p in ours.parameters()]
    total = sum(size.numel() for size in sizes)
    features = gathered(orbits, weights)

    def outputs(flat):
        parts = flat.split([size.numel() for size in sizes])
        given = {name: p.view(size) for name, p, size in zip(names, parts, sizes, strict=True)}
        return scattered(orbits, torch.func.functional_call(ours, given, (features,)))

    zero = torch.zeros(total, dtype=torch.float64)
    columns = torch.func.vmap(outputs, chunk_size=64)(torch.eye(total, dtype=torch.float64))
    solution = torch.linalg.lstsq(columns.T, target[:, None], driver="gelsd").solution[:, 0]
    assert outputs(zero).abs().max() == 0
    with torch.no_grad():
        for p, part in zip(ours.parameters(), solution.split([s.numel() for s in sizes]), strict=True):
            p.copy_(part.view(p.shape))


def gathered(orbits, weights):
    """Features of weights with a channel axis after the batch: channels innermost."""
    per_channel = [
        orbits.gather({n: w[:, c] for n, w in weights.items()})
        for c in range(weights[next(iter(weights))].shape[1])
    ]
    return {t: torch.stack([f[t] for f in per_channel], -1).flatten(-2) for t in orbits.types}


def scattered(orbits, features):
    out = orbits.scatter(features)
    return torch.cat([tensor.movedim(-1, 1).flatten() for tensor in out.values()])


@pytest.mark.skipif(importlib.util.find_spec("nfn") is None, reason="nfn is not installed")
@pytest.mark.parametrize("variant", ["NP", "HNP"])
def test_the_published_layers_are_this_one(variant):
    """With copied parameters, and on weights that were not used to copy them."""
    from nfn import layers
    from nfn.common import NetworkSpec, WeightSpaceFeatures
    from nfn.common.data import ArraySpec

    widths, channels = (2, 4, 3, 2), 2
    spec = WeightSpec.mlp(widths)
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    described = NetworkSpec([ArraySpec(s) for s in shapes], [ArraySpec(s[:1]) for s in shapes])
    torch.manual_seed(0)
    published = getattr(layers, f"{variant}Linear")(described, channels, channels).double()

    def theirs(weights):
        matrices = [weights[f"layers.{i}.weight"] for i in range(3)]
        biases = [weights[f"layers.{i}.bias"] for i in range(3)]
        with torch.no_grad():
            out = published(WeightSpaceFeatures(matrices, biases))
        pairs = zip(out.weights, out.biases, strict=True)
        return torch.cat([part.flatten() for pair in pairs for part in pair])

    orbits = Orbits(free_ends(spec)[0] if variant == "NP" else spec)
    ours = EquivariantLinear(orbits, channels, channels, pooling=("mean",)).double()
    copied(ours, theirs, spec, orbits, channels)
    fresh = random_weights(spec, (5, channels), seed=9, dtype=torch.float64)
    with torch.no_grad():
        found = scattered(orbits, ours(gathered(orbits, fresh)))
    torch.testing.assert_close(found, theirs(fresh), rtol=1e-9, atol=1e-9)
