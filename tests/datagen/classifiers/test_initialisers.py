"""Initial weights against the formulas of their families, and against the layers of PyTorch."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from weightspace.datagen.classifiers._initialisers import INITIALISERS, initial_weights
from weightspace.nets import CNN, MLP, RNN, ResNet

# Standard deviation of a standard normal cut at +-2, by its formula.
CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
DEVIATIONS = {
    "glorot_uniform": lambda i, o: math.sqrt(2 / (i + o)),
    "glorot_normal": lambda i, o: math.sqrt(2 / (i + o)),
    "he_uniform": lambda i, o: math.sqrt(2 / i),
    "he_normal": lambda i, o: math.sqrt(2 / i),
    "lecun_normal": lambda i, o: math.sqrt(1 / i),
    "normal": lambda i, o: 0.05,
    "truncated_normal": lambda i, o: 0.05 * CUT,
}
# The largest value over the standard deviation.
EXTREMES = {
    "glorot_uniform": math.sqrt(3),
    "he_uniform": math.sqrt(3),
    "glorot_normal": 2 / CUT,
    "he_normal": 2 / CUT,
    "lecun_normal": 2 / CUT,
    "truncated_normal": 2 / CUT,
}
NETS = {
    "mlp": lambda: MLP((30, 50, 7), activation="relu"),
    "cnn": lambda: CNN((3, 9, 9), (16, 24), 5, kernel_size=(3, 5)),
    "cnn_batch": lambda: CNN((2, 8, 8), (6, 5), 3, norm="batch", residual=True),
    "cnn_layer": lambda: CNN((2, 8, 8), (6, 5), 3, norm="layer"),
    "resnet": lambda: ResNet((3, 8, 8), 4, channels=4, blocks=(1, 1)),
    "rnn": lambda: RNN(9, 6, 4, cell="rnn", embedding=5, layers=2),
    "gru": lambda: RNN(9, 6, 4, cell="gru", embedding=5, layers=2),
    "lstm": lambda: RNN(3, 6, 4, cell="lstm", sequence="floats"),
}


def drawn(net, name, networks=1, seed=0, keys=None, scales=1.0):
    """The networks' tensors by name, (networks, *shape)."""
    keys = np.arange(networks) if keys is None else np.asarray(keys)
    codes = np.full(len(keys), INITIALISERS.index(name))
    flat = torch.from_numpy(
        initial_weights(net, seed, keys, codes, np.broadcast_to(scales, len(keys)).astype(float))
    )
    state = net.state_dict()
    parts = flat.split([tensor.numel() for tensor in state.values()], dim=1)
    return {
        name: part.view(-1, *tensor.shape) for (name, tensor), part in zip(state.items(), parts, strict=True)
    }


def layers_of(net):
    """Weights that are drawn, with the fans of their layers."""
    for prefix, layer in net.named_modules():
        for name, tensor in layer.named_parameters(recurse=False):
            if tensor.ndim < 2:
                continue
            if isinstance(layer, nn.Embedding):
                yield f"{prefix}.{name}", tensor.shape[1], tensor.shape[1]
            else:
                receptive = math.prod(tensor.shape[2:])
                yield f"{prefix}.{name}", tensor.shape[1] * receptive, tensor.shape[0] * receptive


@pytest.mark.parametrize("family", DEVIATIONS)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "gru"])
def test_the_spread_is_that_of_the_formula(family, kind):
    net = NETS[kind]()
    found = drawn(net, family, networks=120)
    for name, fan_in, fan_out in layers_of(net):
        values = found[name].double().flatten()
        expected = DEVIATIONS[family](fan_in, fan_out)
        # Five standard errors; those of a normal's deviation are 1 / sqrt(2 n).
        tolerance = 5 / math.sqrt(2 * len(values))
        assert values.std().item() == pytest.approx(expected, rel=tolerance), name
        assert abs(values.mean().item()) < 5 * expected / math.sqrt(len(values)), name
        if family in EXTREMES:
            largest = values.abs().max().item() / expected
            assert 0.97 * EXTREMES[family] < largest <= EXTREMES[family] * (1 + 1e-6), name


def test_orthogonal_weights_are_orthonormal_by_rows_or_columns():
    for kind in ("mlp", "cnn", "gru"):
        net = NETS[kind]()
        found = drawn(net, "orthogonal", networks=3, scales=1.5)
        for name, _, _ in layers_of(net):
            for weight in found[name].flatten(2).double():
                small = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
                torch.testing.assert_close(
                    small, 2.25 * torch.eye(len(small), dtype=small.dtype), atol=1e-5, rtol=0
                )


def test_orthogonal_weights_are_uniform_over_signs():
    """Without a correction of the signs of QR the diagonal's mean would not be 0."""
    found = drawn(MLP((3, 3, 2), activation="relu"), "orthogonal", networks=800)["layers.0.weight"]
    assert found.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 800)


@pytest.mark.parametrize("kind", NETS)
def test_pytorch_has_the_bounds_of_its_own_layers(kind):
    """The largest and the spread of very many values, against layers that PyTorch itself has initialised."""
    torch.manual_seed(0)
    net = NETS[kind]()
    made = [NETS[kind]().state_dict() for _ in range(150)]
    found = drawn(net, "pytorch", networks=150)
    norms = [name for name, module in net.named_modules() if hasattr(module, "running_mean")]
    for name in net.state_dict():
        expected = torch.stack([state[name] for state in made])
        if any(name.startswith(f"{norm}.") for norm in norms) or "norm" in name:
            assert torch.equal(found[name], expected), name
        else:
            count = expected.numel()
            assert found[name].std().item() == pytest.approx(
                expected.std().item(), rel=8 / math.sqrt(count)
            ), name
            if "embed" not in name:  # that is normal, the others are uniform: their ends are sharp
                ends = found[name].abs().max().item(), expected.abs().max().item()
                assert ends[0] == pytest.approx(ends[1], rel=10 / count), name


@pytest.mark.parametrize("family", [name for name in INITIALISERS if name != "pytorch"])
@pytest.mark.parametrize("kind", NETS)
def test_biases_are_0_and_norms_the_identity(family, kind):
    net = NETS[kind]()
    drawn_names = {name for name, *_ in layers_of(net)}
    for name, values in drawn(net, family, networks=2).items():
        if name in drawn_names:
            assert (values != 0).float().mean() > 0.99, name
            continue
        is_one = name.endswith("running_var") or ("norm" in name and name.endswith("weight"))
        is_one |= "shortcut.1" in name and name.endswith("weight")
        assert torch.equal(values, torch.full_like(values, float(is_one))), name


@pytest.mark.parametrize("family", INITIALISERS)
def test_a_scale_multiplies_weights_and_nothing_else(family):
    net = NETS["cnn_batch"]()
    plain, large = drawn(net, family), drawn(net, family, scales=3.0)
    names = {name for name, *_ in layers_of(net)}
    for name, values in plain.items():
        torch.testing.assert_close(large[name], values * (3.0 if name in names else 1.0), rtol=1e-6, atol=0)


def test_a_network_depends_on_its_key_and_the_seed_alone():
    net = NETS["cnn_layer"]()
    codes = np.arange(len(INITIALISERS))
    together = initial_weights(net, 3, 10 + codes, codes, 1.0 + codes)
    for at in codes:
        lone = initial_weights(net, 3, 10 + codes[at : at + 1], codes[at : at + 1], np.array([1.0 + at]))
        np.testing.assert_array_equal(lone[0], together[at])
    backwards = initial_weights(net, 3, (10 + codes)[::-1].copy(), codes[::-1].copy(), (1.0 + codes)[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)


def test_equal_keys_give_equal_numbers_and_others_do_not():
    net = MLP((6, 8, 3), activation="relu")
    weight = drawn(net, "normal", keys=[5, 5, 6])["layers.0.weight"]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])
    assert not torch.equal(weight[0], drawn(net, "normal", keys=[5], seed=1)["layers.0.weight"][0])
    # what two families have in common are the random numbers
    scaled = drawn(net, "normal", keys=[5, 5], scales=[1.0, 2.0])["layers.0.weight"]
    torch.testing.assert_close(scaled[1], 2 * scaled[0])


def test_the_largest_seeds_are_keys_too():
    net = MLP((2, 2), activation="relu")
    largest = drawn(net, "normal", keys=[2**62], seed=2**63 - 1)["layers.0.weight"]
    assert not torch.equal(largest, drawn(net, "normal", keys=[2**62 - 1], seed=2**63 - 1)["layers.0.weight"])


def test_the_module_is_left_alone():
    net = NETS["cnn_batch"]()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    drawn(net, "he_normal", networks=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
