"""What every registered augmentation keeps to."""

import inspect
import re
from typing import get_type_hints

import pytest
import torch

from weightspace.datasets import augment
from weightspace.datasets.augment import (
    AUGMENTATIONS,
    Batch,
    Draws,
    GaussianNoise,
    SpaceAugmentation,
    SymmetryAugmentation,
    parse_augmentations,
)
from weightspace.nets import MLP, coordinate_grid, evaluate_batch
from weightspace.testing import random_weights
from weightspace.zoo import spec_of

COUNT = 12
CHECKPOINTS = 3
PER_CHECKPOINT = {"noise", "dropout", "quantile"}
"""These draw for every checkpoint of a trajectory; all others for the trajectory as a whole."""


def net_of(name):
    activation = "relu" if name == "positive" else "sine"
    return MLP((2, 9, 7, 1), activation=activation, w0=3.0, output_offset=0.5).double()


def batch_of(name, batch=(COUNT,), dtype=torch.float64):
    """Networks that suit the augmentation of that name."""
    spec = spec_of(net_of(name))
    views = random_weights(spec, batch, seed=1, dtype=dtype)
    return Batch(
        spec,
        random_weights(spec, batch, dtype=dtype),
        torch.arange(COUNT) % 3,
        classes=3,
        siblings=lambda draws: views,
    )


def flat(batch):
    return batch.spec.flatten(batch.weights)


@pytest.mark.parametrize("name", AUGMENTATIONS)
class TestContract:
    def test_it_says_what_it_does(self, name):
        kind = AUGMENTATIONS[name]
        assert kind.name == name
        assert re.fullmatch(r"[a-z]\w*", name)
        assert kind.keeps in ("exactly", "approximately", "no")
        assert re.fullmatch(r"[a-z][^.]*[a-z]", kind.effect)
        assert kind.paper == "" or re.search(r"\d{4}, arXiv:\d{4}\.\d{5}$", kind.paper)
        assert getattr(augment, kind.__name__) is kind
        first = inspect.getdoc(kind).splitlines()[0]
        assert first.endswith((".", ";")) or len(first) > 60
        assert inspect.getdoc(kind) != inspect.getdoc(kind.__base__)

    def test_it_is_of_the_kind_that_it_says(self, name):
        kind = AUGMENTATIONS[name]
        if issubclass(kind, SymmetryAugmentation):
            assert (kind.keeps, kind.changes_signal) == ("exactly", False)
        if issubclass(kind, SpaceAugmentation):
            assert (kind.keeps, kind.changes_signal) == ("no", True)
        if kind.changes_signal:
            assert kind.keeps == "no"

    def test_it_keeps_the_function_as_it_says(self, name):
        batch, grid = batch_of(name), coordinate_grid((5, 5)).double()
        before, after = (
            evaluate_batch(net_of(name), found.weights, grid)
            for found in (batch, AUGMENTATIONS[name]()(batch))
        )
        difference = (after - before).abs().amax((1, 2)) / before.std((1, 2))
        if AUGMENTATIONS[name].keeps == "exactly":
            assert difference.max() < 1e-10
        else:
            assert difference.max() > 1e-2

    def test_it_changes_something_and_nothing_in_place(self, name):
        batch = batch_of(name)
        weights = {key: (w, w.clone()) for key, w in batch.weights.items()}
        labels = batch.targets.clone()
        after = AUGMENTATIONS[name]()(batch)
        assert all(batch.weights[key] is w and torch.equal(w, copy) for key, (w, copy) in weights.items())
        assert torch.equal(batch.targets, labels)
        changed = not torch.equal(flat(after), flat(batch)) or not torch.equal(after.targets, labels)
        assert changed

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shapes_types_and_names_stay(self, name, dtype):
        for axes in ((COUNT,), (COUNT, CHECKPOINTS)):
            batch = batch_of(name, axes, dtype)
            after = AUGMENTATIONS[name]()(batch)
            assert list(after.weights) == list(batch.weights)
            assert all(after.weights[key].dtype == dtype for key in batch.weights)
            assert {key: w.shape for key, w in after.weights.items()} == {
                key: w.shape for key, w in batch.weights.items()
            }
            assert (after.spec, after.classes, after.signal) == (batch.spec, batch.classes, batch.signal)
            assert len(after.targets) == COUNT

    def test_all_checkpoints_of_a_trajectory_get_the_same_draw(self, name):
        single = batch_of(name)
        repeated = {
            key: w[:, None].expand(-1, CHECKPOINTS, *w.shape[1:]) for key, w in single.weights.items()
        }
        others = {
            key: w[:, None].expand(-1, CHECKPOINTS, *w.shape[1:])
            for key, w in single.siblings(Draws.of(0, COUNT)).items()
        }
        after = flat(AUGMENTATIONS[name]()(single.with_(weights=repeated, siblings=lambda draws: others)))
        same = after[:, :1].expand_as(after)
        if name in PER_CHECKPOINT:
            assert not torch.allclose(after, same)
        else:
            torch.testing.assert_close(after, same, rtol=1e-14, atol=1e-14)

    def test_equal_seeds_give_equal_bits_and_others_do_not(self, name):
        batch, one = batch_of(name), AUGMENTATIONS[name]()
        first, again, other = (flat(one(batch, seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        epoch = flat(one(batch, Draws.of(1, COUNT, epoch=1)))
        if name != "smoothing":
            assert not torch.equal(first, other)
            assert not torch.equal(first, epoch)

    def test_neighbours_and_order_change_no_bits(self, name):
        if name == "mixup":
            return
        batch, one = batch_of(name), AUGMENTATIONS[name]()
        whole = one(batch, Draws.for_items(torch.arange(COUNT) + 100, seed=5))
        chosen = torch.tensor([7, 2, 11])
        others = batch.siblings(Draws.of(0, COUNT))
        part = Batch(
            batch.spec,
            {key: w[chosen] for key, w in batch.weights.items()},
            batch.targets[chosen],
            batch.classes,
            siblings=lambda draws: {key: w[chosen] for key, w in others.items()},
        )
        alone = one(part, Draws.for_items(chosen + 100, seed=5))
        assert torch.equal(flat(alone), flat(whole)[chosen])
        assert torch.equal(alone.targets, whole.targets[chosen])

    def test_it_prints_as_what_builds_it_again(self, name):
        one = AUGMENTATIONS[name]()
        again = eval(repr(one), dict(vars(augment)))
        assert again == one
        assert hash(again) == hash(one)
        assert again != (GaussianNoise(7.0) if name != "noise" else parse_augmentations("sign"))

    def test_its_options_can_be_texts(self, name):
        kind = AUGMENTATIONS[name]
        default = kind()
        given = {key: str(value) for key, value in vars(default).items() if value is not None}
        assert kind(**given) == default
        text = ", ".join(f"{key}={value}" for key, value in given.items())
        assert parse_augmentations(f"{name}({text})").parts == (default,)
        assert parse_augmentations(name).parts == (default,)

    def test_its_options_are_described(self, name):
        init = AUGMENTATIONS[name].__init__
        hints = get_type_hints(init, include_extras=True)
        for option, parameter in list(inspect.signature(init).parameters.items())[1:]:
            assert parameter.default is not inspect.Parameter.empty
            assert any(getattr(part, "description", None) for part in hints[option].__metadata__)
            assert f"\n    {option}: " in inspect.getdoc(AUGMENTATIONS[name])


def test_names_register_once():
    with pytest.raises(ValueError, match="augmentation 'noise' is registered twice"):
        AUGMENTATIONS.register("noise")(GaussianNoise)
