"""The equivariant layer: equivariant, complete, and equal to the published counts."""

import numpy as np
import pytest
import torch

from weightspace.errors import ConfigError, SpecError
from weightspace.models import EquivariantLinear, Orbits
from weightspace.spec import WeightSpec
from weightspace.testing import assert_equivariant, mixed_spec, random_weights, tiny_specs

SPECS = tiny_specs()


class OnWeights(torch.nn.Module):
    """Weights in, weights out, with one channel in and the mean over channels out."""

    def __init__(self, spec, channels=1, **options):
        super().__init__()
        self.orbits = Orbits(spec)
        self.layer = EquivariantLinear(self.orbits, 1, channels, **options)

    def forward(self, weights):
        out = self.orbits.scatter(self.layer(self.orbits.gather(weights)))
        return {name: tensor.mean(-1) for name, tensor in out.items()}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("pooling", [("mean",), ("max",), ("sum", "max"), ("mean", "max")])
def test_it_is_equivariant(name, pooling):
    torch.manual_seed(0)
    assert_equivariant(OnWeights(SPECS[name], 3, pooling=pooling), SPECS[name])


@pytest.mark.parametrize(
    ("widths", "maps", "biases"),
    [([2, 4, 1], 41, 5), ([2, 4, 4, 1], 75, 7), ([2, 4, 4, 4, 1], 117, 9)],
)
def test_its_size_is_the_number_of_equivariant_maps(widths, maps, biases):
    """The counts were confirmed by enumerating orbits by brute force."""
    layer = EquivariantLinear(Orbits(WeightSpec.mlp(widths)), 1, 1, pooling=("mean",))
    assert sum(p.numel() for p in layer.weight.parameters()) == maps
    assert sum(p.numel() for p in layer.bias.parameters()) == biases


def null_space_dimension(spec):
    """Dimension of {A, b : A g W + b = g (A W + b) for all g}, from generators of the group."""
    size = spec.num_parameters
    identity = torch.eye(size, dtype=torch.float64)
    generators = []
    for name, group in spec.groups.items():
        for i in range(group.size - 1):
            swap = torch.arange(group.size)
            swap[[i, i + 1]] = swap[[i + 1, i]]
            generators.append(spec.flatten(spec.act({name: swap}, spec.unflatten(identity))).numpy())
    # the commutant's dimension is that of the fixed points of G x G^-T on vec(A)
    rows = np.concatenate([np.kron(g, g) - np.eye(size * size) for g in generators])
    gram = rows.T @ rows
    maps = int((np.linalg.eigvalsh(gram) < 1e-9).sum())
    fixed = sum((g - np.eye(size)).T @ (g - np.eye(size)) for g in generators)
    return maps, int((np.linalg.eigvalsh(fixed) < 1e-9).sum())


@pytest.mark.parametrize("widths", [[2, 3, 1], [1, 3, 3, 1]])
def test_it_is_complete(widths):
    """Its span is the whole null space of the symmetry constraints: equal dimensions, no parameter idle."""
    spec = WeightSpec.mlp(widths)
    maps, biases = null_space_dimension(spec)
    model = OnWeights(spec, pooling=("mean",)).double()
    assert sum(p.numel() for p in model.layer.weight.parameters()) == maps
    assert sum(p.numel() for p in model.layer.bias.parameters()) == biases
    inputs = random_weights(spec, (4 * spec.num_parameters,), dtype=torch.float64)

    def outputs(**parameters):
        return spec.flatten(torch.func.functional_call(model, parameters, (inputs,))).flatten()

    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    columns = []
    for name, p in zero.items():
        for at in range(p.numel()):
            one = p.clone()
            one.view(-1)[at] = 1.0
            columns.append(outputs(**{**zero, name: one}))
    rank = np.linalg.matrix_rank(torch.stack(columns).detach().numpy())
    assert rank == maps + biases


def test_a_value_by_hand():
    """2-2-1 without biases, mean pooling: W1 -> W1 is a x + b mean(x), with the weights that we set."""
    spec = WeightSpec.mlp([1, 2, 1], bias=False)
    model = OnWeights(spec, pooling=("mean",))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        # the type (hidden0,) holds W0 and W1: rows are targets, columns sources
        model.layer.weight["g0"][1, 1] = 2.0
        model.layer.weight["all"][1, 0] = 10.0
        model.layer.bias["g0"][1] = 0.5
    weights = {
        "layers.0.weight": torch.tensor([[[1.0], [3.0]]]),
        "layers.1.weight": torch.tensor([[[5.0, 7.0]]]),
    }
    out = model(weights)
    assert out["layers.0.weight"].flatten().tolist() == [0.0, 0.0]
    assert out["layers.1.weight"].flatten().tolist() == [2 * 5 + 10 * 2 + 0.5, 2 * 7 + 10 * 2 + 0.5]


@pytest.mark.parametrize("name", SPECS)
def test_gather_and_scatter_are_inverse(name):
    spec = SPECS[name]
    weights = random_weights(spec, (3,))
    orbits = Orbits(spec)
    again = orbits.scatter(orbits.gather(weights))
    for key, tensor in weights.items():
        assert torch.equal(again[key][..., 0], tensor)


def test_what_is_not_supported_is_refused():
    with pytest.raises(SpecError, match=r"'query': the nested group 'features'"):
        Orbits(mixed_spec())
    with pytest.raises(ConfigError, match="expected some of mean, max, sum, found \\['median'\\]"):
        EquivariantLinear(Orbits(SPECS["2-4-1 sine"]), 1, 1, pooling=("median",))
