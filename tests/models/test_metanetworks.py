"""Metanetworks: what they are invariant to, what they are not, and that they can learn."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from weightspace.errors import ConfigError, RunError, SpecError
from weightspace.models import (
    DWS,
    MODELS,
    NFN,
    UNF,
    DeepSets,
    FlatMLP,
    Probe,
    SetAttention,
    StatisticsMLP,
    StatisticsTrees,
    model_config,
    statistics,
)
from weightspace.nets import MLP
from weightspace.spec import WeightSpec
from weightspace.testing import EquivarianceError, assert_invariant, random_weights, tiny_specs
from weightspace.zoo import spec_of

NETS = {
    "sine": MLP((2, 6, 5, 2), w0=2.0, output_offset=0.5),
    "tanh": MLP((3, 5, 1), activation="tanh"),
    "relu": MLP((2, 6, 6, 1), activation="relu"),
    "gaussian": MLP((1, 7, 2), activation="gaussian", w0=1.5),
}


def settled(model, spec):
    """In eval mode, with running statistics that are not the initial ones."""
    torch.manual_seed(1)
    for seed in range(3):
        model(random_weights(spec, (16,), seed))
    return model.eval()


def probe(net, **options):
    return Probe(net, 4, **options)


@pytest.mark.parametrize("name", tiny_specs())
@pytest.mark.parametrize(
    "options", [{}, {"norm": "none", "pooling": ("sum",)}, {"pooling": ("max",), "dropout": 0.3}]
)
def test_dws_is_invariant_to_permutations(name, options):
    spec = tiny_specs()[name]
    torch.manual_seed(0)
    assert_invariant(settled(DWS(spec, 4, hidden=6, layers=3, **options), spec), spec)


@pytest.mark.parametrize("name", NETS)
def test_probes_are_invariant_to_every_symmetry(name):
    net = NETS[name]
    spec = spec_of(net)
    torch.manual_seed(0)
    model = settled(probe(net, probes=5, hidden=(16,)), spec)
    found = assert_invariant(model, spec, symmetries=spec.symmetries, tolerance={torch.float64: 1e-10})
    assert set(found) == {torch.float64}
    assert "permutation" in spec.symmetries
    assert len(spec.symmetries) > 1


@pytest.mark.parametrize("name", tiny_specs())
def test_statistics_are_invariant_to_permutations(name):
    spec = tiny_specs()[name]
    torch.manual_seed(0)
    assert_invariant(settled(StatisticsMLP(spec, 4, hidden=(16,)), spec), spec)
    assert_invariant(lambda weights: statistics(spec, weights), spec)


@pytest.mark.parametrize("name", ["2-4-1 sine", "2-4-4-1 tanh"])
def test_the_flat_mlp_is_not_invariant(name):
    spec = tiny_specs()[name]
    torch.manual_seed(0)
    with pytest.raises(EquivarianceError, match="relative error"):
        assert_invariant(settled(FlatMLP(spec, 4, hidden=(16,)), spec), spec)


def test_dws_sees_signs_that_probes_do_not():
    """It is invariant to permutations only; sign augmentation exists to teach it the rest."""
    net = NETS["tanh"]
    spec = spec_of(net)
    torch.manual_seed(0)
    with pytest.raises(EquivarianceError, match="under sign"):
        assert_invariant(settled(DWS(spec, 4, hidden=6, layers=2), spec), spec, symmetries=["sign"])


def test_statistics_by_hand():
    """Mean, variance, minimum, quartiles, maximum of 0, 1, 2, 3, 4 and of 5 values of 7; a bias alone."""
    spec = WeightSpec.mlp([1, 5, 1])
    flat = torch.tensor([0.0, 1, 2, 3, 4, 7, 7, 7, 7, 7, 1, 0, 0, 0, -1, 9])
    found = statistics(spec, spec.unflatten(flat))
    assert found.tolist() == pytest.approx(
        [2, 2, 0, 1, 2, 3, 4, *[7, 0, 7, 7, 7, 7, 7], *[0, 0.4, -1, 0, 0, 0, 1], 9]
    )
    batched = statistics(spec, spec.unflatten(torch.stack([flat, 2 * flat])))
    assert torch.equal(batched[0], found)
    assert batched[1, :7].tolist() == pytest.approx([4, 8, 0, 2, 4, 6, 8])


def test_a_probe_reads_the_outputs_of_the_networks():
    """Equal functions give equal answers, and the network that lends its computation is not trained."""
    net = MLP((2, 6, 1), activation="tanh")
    spec = spec_of(net)
    model = probe(net, probes=3).eval()
    assert all(net.layers[0].weight is not p for p in model.parameters())
    assert {name for name, _ in model.named_parameters() if not name.startswith("read.")} == {"source.values"}
    assert model.probes.shape == (3, 2)
    assert model.probes.abs().max() <= 1
    weights = random_weights(spec, (4,))
    zeroed = {**weights, "layers.1.weight": torch.zeros(4, 1, 6), "layers.1.bias": torch.full((4, 1), 0.3)}
    out = model(zeroed)
    torch.testing.assert_close(out, out[:1].expand(4, -1))
    assert model(weights).std(0).max() > 1e-3


@pytest.mark.parametrize("kind", ["dws", "probe"])
def test_it_can_learn_arbitrary_labels_by_heart(kind):
    """20 random networks, 4 random classes; chance is 25 %, untrained is far from it."""
    net = MLP((2, 6, 6, 1), w0=3.0)
    spec = spec_of(net)
    weights = random_weights(spec, (20,))
    labels = torch.randint(4, (20,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = DWS(spec, 4, hidden=12, layers=2) if kind == "dws" else probe(net, probes=16, hidden=(64,))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = cross_entropy(model(weights), labels).item()
    for _ in range(150):
        optimiser.zero_grad()
        loss = cross_entropy(model(weights), labels)
        loss.backward()
        optimiser.step()
    assert before > 1.0
    assert loss.item() < 0.05
    assert (model(weights).argmax(-1) == labels).all()
    # by heart, but modulo symmetry: the same networks in another order of their units
    element = spec.random_element(
        (20,), symmetries=["permutation"], generator=torch.Generator().manual_seed(1)
    )
    assert (model(spec.act(element, weights)).argmax(-1) == labels).all()


def test_all_parameters_of_dws_are_trained():
    spec = WeightSpec.mlp([2, 5, 5, 1], activation="tanh")
    torch.manual_seed(0)
    model = DWS(spec, 3, hidden=4, layers=2)
    model(random_weights(spec, (8,))).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert idle == []


def test_trees_are_saved_and_loaded(tmp_path):
    spec = WeightSpec.mlp([2, 4, 1], activation="tanh")
    weights = random_weights(spec, (90,))
    labels = 2 * torch.bucketize(weights["layers.1.bias"].flatten().contiguous(), torch.tensor([-0.4, 0.4]))
    trees = StatisticsTrees(spec, 6, iterations=20)
    trees.fit_once(weights, labels)
    out = trees(weights)
    assert out.shape == (90, 6)
    assert (out.argmax(-1) == labels).float().mean() > 0.95
    torch.testing.assert_close(out[:, [0, 2, 4]].exp().sum(-1), torch.ones(90))
    assert (out[:, [1, 3, 5]] == -30.0).all(), "classes that training lacks"
    trees.save(tmp_path / "trees.skops")
    again = StatisticsTrees(spec, 6)
    again.load(tmp_path / "trees.skops")
    assert torch.equal(again(weights), out)
    (tmp_path / "trees.skops").write_bytes((tmp_path / "trees.skops").read_bytes()[:200])
    with pytest.raises(RunError, match=r"trees\.skops cannot be read \(") as caught:
        again.load(tmp_path / "trees.skops")
    assert "\n" not in str(caught.value)


def test_trees_say_what_they_cannot_do():
    spec = WeightSpec.mlp([2, 4, 1])
    weights = {name: w.requires_grad_() for name, w in random_weights(spec, (30,)).items()}
    torch.manual_seed(0)
    trees = StatisticsTrees(spec, 2, iterations=2)
    with pytest.raises(RunError, match="model statistics: the trees are not fitted; call fit_once, or load"):
        trees(weights)
    for labels in (torch.arange(30) % 3, torch.arange(30) % 2 - 1):
        with pytest.raises(ConfigError, match=r"expected labels in 0 ... 1, found (0 ... 2|-1 ... 0)"):
            trees.fit_once(weights, labels)
    trees.fit_once(weights, torch.arange(30) % 2)
    assert trees(weights).shape == (30, 2)
    assert trees(random_weights(spec, (0,))).shape == (0, 2)
    trees.fit_once(weights, torch.randn(30, requires_grad=True))
    with pytest.raises(ConfigError, match="statistics: expected out_features of at least 1, found 0"):
        StatisticsTrees(spec, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_are_numbers_of_single(dtype):
    spec = WeightSpec.mlp([2, 4, 1])
    weights = {name: w.to(dtype) for name, w in random_weights(spec, (5,)).items()}
    found = statistics(spec, weights)
    assert found.dtype == torch.float32
    assert torch.equal(found, statistics(spec, {name: w.float() for name, w in weights.items()}))
    model = StatisticsMLP(spec, 2, hidden=(4,)).to(torch.bfloat16).eval()
    assert model(weights).dtype == torch.bfloat16


def test_trees_of_foreign_types_are_refused(tmp_path):
    import skops.io

    skops.io.dump(np.random.default_rng(0).normal, tmp_path / "odd.skops")
    with pytest.raises(RunError, match=r"odd\.skops cannot be read \(UntrustedTypesFoundException\)"):
        StatisticsTrees(WeightSpec.mlp([2, 4, 1]), 2).load(tmp_path / "odd.skops")


# -- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("cnn", {}, "model: expected one of dws, nfn, unf, mlp, deepsets, statistics, probe, "),
        ("dws", {"hiden": 3}, "model.hiden: unknown option of dws; expected one of hidden, layers, pooling"),
        ("dws", {"hidden": 0}, "model.hidden: input should be greater than or equal to 1, found 0"),
        (
            "dws",
            {"pooling": ["median"]},
            "model.pooling.0: input should be 'mean', 'max' or 'sum', found 'median'",
        ),
        ("dws", {"dropout": 1.0}, "model.dropout: input should be less than 1, found 1.0"),
        ("mlp", {"layers": 3}, "model.layers: unknown option of mlp; expected one of hidden, dropout"),
        ("probe", {"probes": "many"}, "model.probes: input should be a valid integer"),
        (
            "statistics",
            {"reader": "forest"},
            "model.reader: input should be 'trees' or 'mlp', found 'forest'",
        ),
    ],
)
def test_options_are_refused_by_name(model, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        model_config(model, options)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_built_from_its_options(name):
    net = MLP((2, 5, 1))
    options = {"statistics": {"reader": "mlp"}}.get(name, {})
    model = model_config(name, options).build(spec_of(net), {"kind": "mlp", "arguments": net.arguments()}, 3)
    assert model.eval()(random_weights(spec_of(net), (4,))).shape == (4, 3)
    assert re.search(r"arXiv:\d{4}\.\d{5}", MODELS[name].paper)


CLASSES = {"dws": DWS, "nfn": NFN, "unf": UNF, "mlp": FlatMLP, "deepsets": DeepSets, "probe": Probe}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_options_have_the_same_defaults(name):
    given = inspect.signature(CLASSES[name]).parameters
    fields = {key: field.default for key, field in MODELS[name].model_fields.items()}
    assert fields == {key: given[key].default for key in fields}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "statistics"])
def test_no_networks_give_no_rows_and_layouts_do_not_matter(name):
    net = MLP((2, 5, 1))
    spec = spec_of(net)
    torch.manual_seed(0)
    model = model_config(name).build(spec, {"kind": "mlp", "arguments": net.arguments()}, 3).eval()
    if name != "graph":
        assert model(random_weights(spec, (0,))).shape == (0, 3)
    flat = torch.randn(spec.num_parameters, 4)
    expected = model(spec.unflatten(flat.T.contiguous()))
    torch.testing.assert_close(model(spec.unflatten(flat.T)), expected)


def test_the_preset_of_dws_has_the_published_sizes():
    spec = WeightSpec.mlp([2, 6, 6, 1])
    model = model_config("dws", {"preset": "paper"}).build(spec, None, 10)
    assert len(model.stack.blocks) == 5
    assert {block.pooling for block in model.stack.blocks} == {("max",)}
    assert [layer.heads for layer in model.modules() if isinstance(layer, SetAttention)] == [8] * 5
    (read,) = model.head.read
    assert read.out_features == 10
    assert_invariant(settled(model, spec), spec)
    assert model_config("dws", {"preset": "paper"}).build(spec, None, None).stack.blocks


def test_the_preset_of_nfn_has_the_published_sizes():
    spec = WeightSpec.mlp([2, 3, 1])
    config = model_config("nfn", {"preset": "paper"})
    model = config.build(spec, None, 10)
    assert model.stack.encoding.channels == 256
    assert [(block.in_channels, block.out_channels) for block in model.stack.blocks] == [
        (256, 512),
        (512, 512),
        (512, 512),
    ]
    linear = [layer for layer in model.head.read if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [1000, 1000, 10]
    dropped = [layer.p for layer in model.head.read if isinstance(layer, torch.nn.Dropout)]
    assert dropped == [0.1, 0.1]
    assert_invariant(model.eval(), spec, tolerance={torch.float32: 1e-4})
    assert model_config("nfn", {"head": 7}).build(spec, None, 2).head.read[-1].in_features == 7
    for head in (0, [3, 0], "many"):
        message = r"model\.head: input should be an integer of at least 1, or several"
        with pytest.raises(ConfigError, match=message):
            model_config("nfn", {"head": head})


def test_what_a_model_cannot_read_is_refused():
    spec = WeightSpec.mlp([2, 4, 1])
    with pytest.raises(ConfigError, match="model probe: the zoo does not say how to rebuild its networks"):
        model_config("probe").build(spec, None, 3)
    with pytest.raises(
        SpecError, match=r"axis 1 has 784 fixed indices; .*; choose wide='project' or wide='encode'"
    ):
        DWS(WeightSpec.mlp([784, 4, 10]), 3)
    with pytest.raises(ConfigError, match="model mlp: gives numbers and no weights"):
        model_config("mlp").build(spec, None, None)
    with pytest.raises(ConfigError, match=r"model.preset: dws has the presets paper, found 'papre'"):
        model_config("dws", {"preset": "papre"})
    with pytest.raises(ConfigError, match="expected layers >= 1, hidden >= 1, dropout"):
        DWS(spec, 3, layers=0)
    with pytest.raises(ConfigError, match="norm: expected batch or none, found 'layer'"):
        DWS(spec, 3, norm="layer")


def test_names_register_once():
    with pytest.raises(ValueError, match="model 'dws' is registered twice"):
        MODELS.register("dws", paper="arXiv:0000.00000")(MODELS["dws"])
