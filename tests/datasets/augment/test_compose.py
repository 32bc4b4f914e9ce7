"""Several augmentations one after the other, and the text that names them."""

import re

import pytest
import torch

from weightspace.datasets import ZooDataset
from weightspace.datasets.augment import (
    AUGMENTATIONS,
    Batch,
    Compose,
    Draws,
    GaussianNoise,
    LabelSmoothing,
    MixUp,
    Permutation,
    PhaseShift,
    PositiveScaling,
    Rotation,
    SignFlip,
    Views,
    parse_augmentations,
)
from weightspace.errors import ConfigError
from weightspace.spec import WeightSpec
from weightspace.testing import mixed_spec, random_weights, tiny_zoo

SINE = WeightSpec.mlp([2, 6, 5, 1], activation="sine", w0=3.0)
CHAINS = {
    "symmetries": [SignFlip(), Permutation(), PhaseShift(), Permutation(), SignFlip()],
    "permutation first": [Permutation(), PhaseShift(), SignFlip()],
    "interrupted": [SignFlip(), Permutation(), SignFlip(), GaussianNoise(0.1), Permutation(), Permutation()],
    "rotated": [Permutation(), Rotation(), SignFlip(), Rotation()],
    "mixed": [SignFlip(), Permutation(), MixUp("aligned"), Permutation(), LabelSmoothing()],
    "nested": [Compose([SignFlip(), Permutation()]), Permutation(), Compose([GaussianNoise(0.1)])],
}


def batch_of(spec=SINE, shape=(6,)):
    weights = random_weights(spec, shape, dtype=torch.float64)
    return Batch(spec, weights, torch.arange(shape[0]), classes=shape[0])


@pytest.mark.parametrize("shape", [(6,), (6, 3)])
@pytest.mark.parametrize("chain", CHAINS)
def test_neighbouring_symmetries_are_applied_as_one_and_nothing_else_changes(chain, shape):
    batch = batch_of(shape=shape)
    together = Compose(CHAINS[chain])(batch, seed=5)
    draws, one_by_one = Draws.of(5, 6), batch
    for augmentation in CHAINS[chain]:
        one_by_one = augmentation(one_by_one, draws)
    flat = SINE.flatten(together.weights)
    torch.testing.assert_close(flat, SINE.flatten(one_by_one.weights), rtol=1e-11, atol=1e-11)
    assert torch.equal(together.targets, one_by_one.targets)
    assert (flat != SINE.flatten(batch.weights)).float().mean() > 0.8


@pytest.mark.parametrize("kind", ["relu", "nested groups"])
def test_symmetries_of_other_spaces_are_fused_too(kind):
    spec = mixed_spec() if kind == "nested groups" else WeightSpec.mlp([2, 6, 5, 1])
    chain = [Permutation(), Permutation()]
    chain = (
        chain if kind == "nested groups" else [PositiveScaling(), *chain, PositiveScaling(), Permutation()]
    )
    batch = batch_of(spec)
    together, draws, one_by_one = Compose(chain)(batch, seed=5), Draws.of(5, 6), batch
    for augmentation in chain:
        one_by_one = augmentation(one_by_one, draws)
    # products of factors are float32, whatever the weights are
    tolerance = 1e-11 if kind == "nested groups" else 1e-6
    found, expected = (spec.flatten(batch.weights) for batch in (together, one_by_one))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_targets_that_are_weights_move_once():
    batch = batch_of()
    batch = batch.with_(targets={name: w.clone() for name, w in batch.weights.items()})
    after = Compose(CHAINS["symmetries"])(batch, seed=5)
    assert torch.equal(SINE.flatten(after.targets), SINE.flatten(after.weights))


def test_an_empty_composition_changes_nothing():
    batch = batch_of()
    assert Compose([])(batch) is batch


def test_every_part_is_checked_before_any_is_applied():
    with pytest.raises(ConfigError, match="positive: expected a weight space with the symmetry positive"):
        Compose([Permutation(), GaussianNoise(), PositiveScaling()]).check(batch_of())
    with pytest.raises(ConfigError, match="positive: expected a weight space with the symmetry positive"):
        ZooDataset(tiny_zoo(), augment=Compose([Permutation(), PositiveScaling()]))
    dataset = ZooDataset(tiny_zoo(views=1), augment=Permutation())
    with pytest.raises(ConfigError, match="views: expected a zoo with several views"):
        dataset.augment = Compose([SignFlip(), Views()])
    assert dataset.augment == Permutation()


# -- the text ----------------------------------------------------------------------------------------------


def test_text_to_augmentations():
    assert parse_augmentations("") is None
    assert parse_augmentations(" , ") is None
    found = parse_augmentations(
        " permutation,sign( 0.25 ) , noise(scale = 0.5),noise, mixup(direct, beta=0.4), mixup( targets=larger ),phase()"
    )
    assert found == Compose(
        [
            Permutation(),
            SignFlip(0.25),
            GaussianNoise(0.5),
            GaussianNoise(),
            MixUp("direct", beta=0.4),
            MixUp(targets="larger"),
            PhaseShift(),
        ]
    )
    assert repr(found).startswith(
        "Compose(parts=(Permutation(), SignFlip(p=0.25), GaussianNoise(scale=0.5), "
    )
    assert hash(found) == hash(Compose(list(found.parts)))


KNOWN = ", ".join(AUGMENTATIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cutout", f"augment: expected some of {KNOWN}, found 'cutout'"),
        ("noise(0.1", f"augment: expected some of {KNOWN}, found 'noise(0.1'"),
        ("sign()x", f"augment: expected some of {KNOWN}, found 'sign()x'"),
        ("permutation sign", f"augment: expected some of {KNOWN}, found 'permutation sign'"),
        ("permutation(3)", "augment: permutation: expected no options, found '3' beside them"),
        ("permutation(p=3)", "augment: permutation: expected no options, found 'p'"),
        (
            "noise(a)",
            "augment: noise: scale: input should be a valid number, unable to parse string as a number, found",
        ),
        ("noise(0.1, 0.2)", "augment: noise: expected the options scale, found '0.2' beside them"),
        ("noise(p=0.1)", "augment: noise: expected the options scale, found 'p'"),
        ("noise(-1)", "augment: noise: scale: input should be greater than or equal to 0, found '-1'"),
        ("noise(nan)", "augment: noise: scale: input should be a finite number, found 'nan'"),
        ("noise(inf)", "augment: noise: scale: input should be a finite number, found 'inf'"),
        ("sign(1.5)", "augment: sign: p: input should be less than or equal to 1, found '1.5'"),
        ("dropout(1)", "augment: dropout: p: input should be less than 1, found '1'"),
        ("phase(0.5)", "augment: phase: steps: input should be a valid integer, unable to parse"),
        (
            "positive(0.5)",
            "augment: positive: factor: input should be greater than or equal to 1, found '0.5'",
        ),
        (
            "rotation(200)",
            "augment: rotation: degrees: input should be less than or equal to 180, found '200'",
        ),
        (
            "mixup(best)",
            "augment: mixup: kind: input should be 'aligned', 'direct', 'permuted' or 'self', found 'best'",
        ),
        ("mixup(direct, beta=0)", "augment: mixup: beta: input should be greater than 0, found '0'"),
        ("mixup(direct, kind=self)", "augment: mixup: kind is given twice"),
        ("mixup(beta=1, beta=2)", "augment: 'mixup(beta=1, beta=2)': beta is given twice"),
        ("mixup(beta=1, self)", "augment: 'mixup(beta=1, self)': an option by position follows one by name"),
    ],
)
def test_mistakes_in_the_text_are_named(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse_augmentations(f"permutation, {text}")
    assert "\n" not in str(caught.value)


def test_mistakes_in_python_are_named_alike():
    with pytest.raises(ConfigError, match=r"^sign: p: input should be less than or equal to 1, found 2$"):
        SignFlip(2)
    with pytest.raises(
        ConfigError, match=r"^mixup: expected the options kind, beta, targets, found 'alpha'$"
    ):
        MixUp(alpha=1.0)
