"""DeepSets, and the flat MLP with alignment."""

import re

import pytest
import torch
from torch.nn.functional import cross_entropy

from weightspace.align import weight_matching
from weightspace.errors import ConfigError, RunError, SpecError
from weightspace.models import DeepSets, FlatMLP, model_config
from weightspace.spec import Group, TensorSpec, WeightSpec
from weightspace.testing import EquivarianceError, assert_invariant, random_weights, tiny_specs


def settled(model, spec):
    """In eval mode, with running statistics that are not the initial ones."""
    for seed in range(3):
        model(random_weights(spec, (16,), seed))
    return model.eval()


# -- DeepSets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_specs())
def test_deepsets_are_invariant_to_permutations(name):
    spec = tiny_specs()[name]
    torch.manual_seed(0)
    model = settled(DeepSets(spec, 4, features=8, hidden=(16,)), spec)
    if spec.groups:
        assert_invariant(model, spec)


def test_deepsets_know_the_tensor_of_a_weight_and_nothing_else():
    """Invariant to any order within each tensor, of each network its own; not to an exchange between two."""
    spec = WeightSpec.mlp([2, 4, 4, 1])
    torch.manual_seed(0)
    model = settled(DeepSets(spec, 3, features=8), spec).double()
    weights = random_weights(spec, (5,), dtype=torch.float64)
    shuffled = {
        name: torch.stack([row.flatten()[torch.randperm(row.numel())].view(row.shape) for row in tensor])
        for name, tensor in weights.items()
    }
    torch.testing.assert_close(model(shuffled), model(weights), rtol=1e-12, atol=1e-12)
    exchanged = {
        **weights,
        "layers.0.bias": weights["layers.1.bias"],
        "layers.1.bias": weights["layers.0.bias"],
    }
    assert (model(exchanged) - model(weights)).abs().max() > 1e-3


def test_deepsets_do_not_see_signs():
    spec = tiny_specs()["2-4-4-1 tanh"]
    torch.manual_seed(0)
    with pytest.raises(EquivarianceError, match="under sign"):
        assert_invariant(settled(DeepSets(spec, 4), spec), spec, symmetries=["sign"])


def test_deepsets_by_hand():
    """One layer, one feature: the mean and the maximum of relu(slope w + embedding) over all weights."""
    spec = WeightSpec.mlp([1, 2])
    torch.manual_seed(0)
    model = DeepSets(spec, 2, features=1, layers=1, hidden=())
    model.slope.data = torch.tensor([[2.0], [-1.0]])
    model.embedding.data = torch.tensor([[1.0], [0.0]])
    model.read[0].weight.data, model.read[0].bias.data = torch.eye(2), torch.zeros(2)
    weights = {
        "layers.0.weight": torch.tensor([[[1.0], [-3.0]]]),
        "layers.0.bias": torch.tensor([[4.0, -5.0]]),
    }
    assert model(weights)[0].tolist() == [(3 + 0 + 0 + 5) / 4, 5.0]


def test_deepsets_learn_by_heart_with_every_parameter():
    spec = WeightSpec.mlp([2, 6, 1])
    weights = random_weights(spec, (20,))
    labels = torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = DeepSets(spec, 3, features=32, hidden=(64,))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        loss = cross_entropy(model(weights), labels)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05
    assert [name for name, p in model.named_parameters() if not p.grad.abs().any()] == []


# -- alignment ---------------------------------------------------------------------------------------------


def aligned_mlp(spec, **options):
    torch.manual_seed(0)
    return FlatMLP(spec, 3, hidden=(16,), align=True, **options)


def test_shuffled_copies_of_the_reference_are_one_network():
    spec = WeightSpec.mlp([2, 8, 8, 1], activation="tanh")
    model = aligned_mlp(spec)
    model(random_weights(spec, (16,)))  # in training: its first network becomes the reference
    first = random_weights(spec, (16,))
    assert torch.equal(model.reference, spec.flatten(first)[0])
    model(random_weights(spec, (16,), seed=1))
    assert torch.equal(model.reference, spec.flatten(first)[0]), "chosen once"
    model.eval()
    copies = {name: tensor[:1].expand(9, *tensor.shape[1:]) for name, tensor in first.items()}
    element = spec.random_element(
        (9,), symmetries=["permutation"], generator=torch.Generator().manual_seed(1)
    )
    shuffled = spec.act(element, copies)
    torch.testing.assert_close(model(shuffled), model(copies))
    blind = FlatMLP(spec, 3, hidden=(16,)).eval()
    assert (blind(shuffled) - blind(copies)).abs().max() > 1e-2


def test_others_are_read_as_weight_matching_leaves_them():
    spec = WeightSpec.mlp([2, 6, 1])
    model = aligned_mlp(spec).eval()
    reference = random_weights(spec, (), seed=5)
    model.set_reference(reference)
    weights = random_weights(spec, (7,))
    aligned, _ = weight_matching(spec, reference, weights)
    torch.testing.assert_close(model(weights), model.network(spec.flatten(aligned)))


def test_the_reference_is_saved_with_the_model():
    spec = WeightSpec.mlp([2, 6, 1])
    model = aligned_mlp(spec)
    model(random_weights(spec, (4,)))
    again = aligned_mlp(spec)
    again.load_state_dict(model.state_dict())
    weights = random_weights(spec, (5,), seed=2)
    assert torch.equal(again.eval()(weights), model.eval()(weights))
    assert "reference" not in FlatMLP(spec, 3).state_dict()


def test_the_reference_is_the_first_network_of_finite_weights():
    spec = WeightSpec.mlp([2, 6, 1])
    model = aligned_mlp(spec)
    weights = random_weights(spec, (4,))
    weights["layers.0.bias"][0, 2] = torch.nan
    weights["layers.1.weight"][1, 0, 3] = torch.inf
    with pytest.raises(SpecError, match=r"expected finite values, but tensor 'layers\.0\.bias' of pair 0"):
        model(weights)  # not all of them can be matched; the next batch can
    assert torch.equal(model.reference, spec.flatten(weights)[2])
    assert torch.isfinite(model.eval()(random_weights(spec, (3,), seed=1))).all()
    with pytest.raises(RunError, match="cannot align to a network whose weights are not all finite"):
        aligned_mlp(spec)({name: w[:2] for name, w in weights.items()})


def test_deepsets_are_built_without_memory():
    with torch.device("meta"):
        model = DeepSets(WeightSpec.mlp([2, 6, 1]), 3)
    assert model.owner.shape == (25,)


@pytest.mark.parametrize("build", [DeepSets, FlatMLP])
def test_networks_come_in_one_batch(build):
    spec = WeightSpec.mlp([2, 6, 1])
    with pytest.raises(SpecError, match=r"weights: expected one batch axis, found shape \[\]"):
        build(spec, 3).eval()(random_weights(spec))
    with pytest.raises(ConfigError, match="hidden units of at least 1, found 3 and 4, 0"):
        build(spec, 3, hidden=(4, 0))


def test_gradients_pass_through_the_alignment():
    spec = WeightSpec.mlp([2, 6, 1])
    model = aligned_mlp(spec)
    weights = {name: tensor.requires_grad_() for name, tensor in random_weights(spec, (4,)).items()}
    model(weights).square().sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in weights.values())


def test_bad_input_is_refused():
    spec = WeightSpec.mlp([2, 6, 1])
    with pytest.raises(
        RunError, match="model mlp: nothing to align to; train it first, or call set_reference"
    ):
        aligned_mlp(spec).eval()(random_weights(spec, (2,)))
    thrice = WeightSpec.build([Group("g", 3)], {"w": TensorSpec.dense((3, 3, 3), ["g"] * 3)})
    with pytest.raises(SpecError, match="group 'g'"):
        aligned_mlp(thrice)
    with pytest.raises(ConfigError, match="deepsets: expected features and layers >= 1, found 0 and 2"):
        DeepSets(spec, 3, features=0)
    message = "model.features: input should be greater than or equal to 1, found 0"
    with pytest.raises(ConfigError, match=re.escape(message)):
        model_config("deepsets", {"features": 0})
    with pytest.raises(ConfigError, match="model deepsets: gives numbers and no weights"):
        model_config("deepsets").build(spec, None, None)
