"""Whole zoos in canonical form: exact, idempotent, resumable, and one line for every mistake."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from weightspace.datasets import CanonicalReport, canonicalize_zoo
from weightspace.errors import ConfigError, OutputError, SpecError, ZooError
from weightspace.nets import MLP, RNN
from weightspace.spec import Group, TensorSpec, WeightSpec, output_change
from weightspace.testing import tiny_zoo
from weightspace.zoo import RowStore, Zoo, spec_of, stored_weights, verify_digest

METHODS = ("sort", "align")


def in_dtype(zoo, dtype):
    """The zoo with its weights stored in another type."""
    return Zoo(
        {
            name: replace(zoo[name], weights=stored_weights(zoo[name].weights, dtype), dtype=dtype)
            for name in zoo
        },
        zoo.sources,
    )


def relu_zoo(networks=12):
    """ReLU networks have positive factors."""
    torch.manual_seed(0)
    nets = [MLP((3, 9, 7, 2), activation="relu") for _ in range(networks)]
    return Zoo.from_state_dicts([net.state_dict() for net in nets], module=nets[0])


def trajectories(networks=8, checkpoints=3):
    """Networks with several checkpoints: all first ones, then all second ones, and so on."""
    inr = tiny_zoo(networks=networks)["inr"]
    noise = np.random.default_rng(0).normal(0, 0.05, (checkpoints - 1, *inr.weights.shape)).astype(np.float32)
    population = replace(
        inr,
        weights=np.concatenate([inr.weights, *(inr.weights + np.cumsum(noise, 0))]),
        network=np.tile(inr.network, checkpoints),
        step=np.repeat(np.arange(checkpoints, dtype=np.int64), networks),
        metrics={"psnr": np.arange(checkpoints * networks, dtype=np.float32)},
    )
    return Zoo({"inr": population})


def coarse_zoo():
    """Networks of few different weights: many of them zero, and many units equal."""
    inr = tiny_zoo()["inr"]
    return Zoo({"inr": replace(inr, weights=np.round(2 * inr.weights) / 2)})


ZOOS = {
    "sine": tiny_zoo,
    "coarse": coarse_zoo,
    "relu": relu_zoo,
    "trajectories": trajectories,
    "half": lambda: in_dtype(tiny_zoo(), "float16"),
    "brain": lambda: in_dtype(relu_zoo(), "bfloat16"),
}


@pytest.fixture
def canonical(tmp_path):
    """The zoo in canonical form, and the report."""

    def one(zoo, method="sort", name="out.h5", **options) -> tuple[Zoo, CanonicalReport]:
        report = canonicalize_zoo(zoo, tmp_path / name, method=method, progress=False, **options)
        assert verify_digest(tmp_path / name) == report.digest
        return Zoo.open(tmp_path / name), report

    return one


def flat_of(population):
    return population.read(slice(None))


def moved_by(zoo, name, element):
    """The zoo with networks of one population moved."""
    population = zoo[name]
    weights = population.spec.act(element, population.weights_of(slice(None)))
    return Zoo(
        {**zoo.populations, name: replace(population, weights=population.spec.flatten(weights).numpy())}
    )


# -- what is promised --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sine", "relu", "trajectories"])
@pytest.mark.parametrize("method", METHODS)
def test_no_network_computes_anything_else(canonical, method, kind):
    zoo = ZOOS[kind]()
    written, report = canonical(zoo, method)
    for name in zoo:
        old, new = zoo[name], written[name]
        net = MLP((2, 8, 8, 1), output_offset=0.5) if kind != "relu" else MLP((3, 9, 7, 2), activation="relu")
        inputs = net.random_inputs(50, torch.Generator().manual_seed(0))
        changes = [
            output_change(net, old.weights_of(row), new.weights_of(row), inputs) for row in range(old.rows)
        ]
        assert 0 < max(changes) < 2e-5
        told = report.populations[name]
        assert 0 < told.max_relative_change < 2e-5
        assert told.compared == min(16, old.rows)
        assert told.moved > 0.9 * old.rows - 1
        assert told.kept == 0


@pytest.mark.parametrize("kind", ZOOS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_in_form_keeps_its_digest(canonical, method, kind):
    written, first = canonical(ZOOS[kind](), method)
    _, second = canonical(written, method, "again.h5")
    assert second.digest == first.digest
    assert sum(found.moved for found in first.populations.values()) > 0
    assert sum(found.moved for found in second.populations.values()) == 0


@pytest.mark.parametrize("kinds", [["permutation"], ["permutation", "sign"]])
def test_alignment_by_permutations_and_signs_keeps_every_weight_to_the_bit(canonical, kinds):
    zoo = tiny_zoo()
    written, report = canonical(zoo, "align", symmetries=kinds)
    assert report.populations["inr"].symmetries == tuple(kinds)
    old, new = (part["inr"].weights_of(slice(None)) for part in (zoo, written))
    for name, tensor in old.items():
        one, other = (
            (w if kinds == ["permutation"] else w.abs()).flatten(1).sort(-1).values
            for w in (tensor, new[name])
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["sine", "relu"])
def test_equal_networks_are_sorted_into_the_same_one(canonical, kind):
    zoo = ZOOS[kind]()
    name = next(iter(zoo))
    spec, generator = zoo[name].spec, torch.Generator().manual_seed(0)
    one, _ = canonical(zoo)
    for kinds, tolerance in ((spec.symmetries, 1e-5), (["permutation", "sign"], 0)):
        drawn = [kind for kind in kinds if kind in spec.symmetries]
        element = spec.random_element((zoo[name].rows,), symmetries=drawn, generator=generator)
        other, _ = canonical(moved_by(zoo, name, element), name=f"{len(drawn)}.h5")
        torch.testing.assert_close(flat_of(other[name]), flat_of(one[name]), rtol=tolerance, atol=tolerance)


def test_shuffled_copies_of_one_network_come_back_bit_for_bit(canonical):
    inr = tiny_zoo()["inr"]
    copies = replace(inr, weights=np.repeat(inr.weights[:1], inr.rows, axis=0))
    element = inr.spec.random_element((inr.rows,), symmetries=["permutation", "sign"])
    shuffled = moved_by(Zoo({"inr": copies}), "inr", element)
    row = int(inr.rows_of("train")[0])
    written, report = canonical(shuffled, "align")
    np.testing.assert_array_equal(
        written["inr"].weights, np.repeat(shuffled["inr"].weights[[row]], inr.rows, axis=0)
    )
    assert report.populations["inr"].reference == row
    assert report.populations["inr"].distance_after == 0


def test_alignment_brings_networks_close_to_the_reference(canonical):
    zoo = tiny_zoo()
    for row in (0, 7):
        written, report = canonical(zoo, "align", f"{row}.h5", reference=row)
        told = report.populations["inr"]
        np.testing.assert_array_equal(written["inr"].weights[row], zoo["inr"].weights[row])
        for found, part in ((told.distance_before, zoo), (told.distance_after, written)):
            difference = flat_of(part["inr"]).double() - torch.from_numpy(zoo["inr"].weights[row]).double()
            assert found == pytest.approx(float(difference.norm(dim=-1).mean()), rel=1e-6)
        assert told.distance_after < 0.8 * told.distance_before
        assert told.reference == row


# -- trajectories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 5, None])
def test_checkpoints_of_a_network_are_sorted_by_its_last_one(canonical, block):
    zoo = trajectories()
    written, _ = canonical(zoo, block=block)
    inr, spec = zoo["inr"], zoo["inr"].spec
    for network in range(inr.networks):
        rows = np.flatnonzero(inr.network == network)
        last, element = spec.canonicalize(inr.weights_of(int(rows[-1])))
        expected = spec.flatten(spec.act(element, inr.weights_of(rows)))
        found = written["inr"].read(rows)
        assert torch.equal(found[:-1], expected[:-1])
        assert torch.equal(found[-1], spec.flatten(last))


def test_checkpoints_of_a_network_are_aligned_together(canonical):
    zoo = trajectories()
    written, report = canonical(zoo, "align", symmetries=["permutation", "sign"])
    assert report.populations["inr"].reference == 16 + int(zoo["inr"].rows_of("train")[0])
    for network in range(8):
        old, new = (
            part["inr"].read(np.flatnonzero(zoo["inr"].network == network)) for part in (zoo, written)
        )
        # one element for all: distances between checkpoints stay
        torch.testing.assert_close(torch.cdist(new, new), torch.cdist(old, old), rtol=1e-4, atol=1e-4)
        alone = replace(tiny_zoo(networks=8)["inr"], weights=zoo["inr"].weights[16:])
    only_last, _ = canonical(Zoo({"inr": alone}), "align", "last.h5", symmetries=["permutation", "sign"])
    np.testing.assert_array_equal(written["inr"].weights[16:], only_last["inr"].weights)


def test_a_reference_that_is_no_last_checkpoint_stays_with_all_of_its_network(canonical):
    zoo = trajectories()
    written, report = canonical(zoo, "align", reference=3)
    rows = zoo["inr"].network == 3
    np.testing.assert_array_equal(written["inr"].weights[rows], zoo["inr"].weights[rows])
    assert report.populations["inr"].moved == 21
    assert canonical(written, "align", "again.h5", reference=3)[1].digest == report.digest


# -- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_all_but_the_weights_stays_and_the_protocol_says_what_was_done(canonical, tmp_path, method):
    made = tiny_zoo()
    made = Zoo(made.populations, made.sources, {"name": "tiny", "seed": 3})
    written, report = canonical(made.save(tmp_path / "zoo.h5"), method)
    old, new = made["inr"], written["inr"]
    for name in ("network", "step", "source", "view", "split"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
    np.testing.assert_array_equal(new.metrics["psnr"], old.metrics["psnr"])
    np.testing.assert_array_equal(new.labels["label"], old.labels["label"])
    np.testing.assert_array_equal(written.sources["tiny"].items, made.sources["tiny"].items)
    assert (new.spec, new.architecture, new.dtype) == (old.spec, old.architecture, old.dtype)
    assert written.recipe == made.recipe
    assert (report.method, report.output) == (method, tmp_path / "out.h5")
    record = dict(new.protocol).pop("canonical")
    assert record["method"] == method
    assert record["symmetries"] == ["permutation", "sign", "phase"]
    assert set(record) == {"method", "symmetries"} | ({"reference", "seed"} if method == "align" else set())
    assert {key: value for key, value in new.protocol.items() if key != "canonical"} == old.protocol
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "zoo.h5"]


def test_the_record_tells_references_apart(canonical):
    records = [
        canonical(tiny_zoo(), "align", f"{row}.h5", reference=row)[0]["inr"].protocol["canonical"][
            "reference"
        ]
        for row in (0, 1)
    ]
    assert [record["row"] for record in records] == [0, 1]
    assert all(record["digest"].startswith("sha256:") for record in records)
    assert records[0]["digest"] != records[1]["digest"]


def test_populations_are_brought_into_form_each_within_itself(canonical):
    parts = {"inr": tiny_zoo()["inr"], "wide": tiny_zoo(hidden=(12,))["inr"], "relu": relu_zoo()["mlp"]}
    zoo = Zoo(parts)
    for method in METHODS:
        written, report = canonical(zoo, method, f"{method}.h5")
        assert list(report.populations) == list(parts)
        for name, part in parts.items():
            alone, _ = canonical(Zoo({name: part}), method, f"{method}-{name}.h5")
            np.testing.assert_array_equal(written[name].weights, alone[name].weights)
            assert written[name].protocol == alone[name].protocol


@pytest.mark.parametrize("chosen", ["wide", ["wide"], "wide,relu"])
def test_populations_that_are_not_asked_for_are_copied(canonical, chosen):
    zoo = Zoo({"inr": tiny_zoo()["inr"], "wide": tiny_zoo(hidden=(12,))["inr"], "relu": relu_zoo()["mlp"]})
    written, report = canonical(zoo, population=chosen)
    assert list(report.populations) == (["wide", "relu"] if chosen == "wide,relu" else ["wide"])
    for name in zoo:
        same = np.array_equal(written[name].weights, zoo[name].weights)
        assert same == (name not in report.populations)
        assert ("canonical" in written[name].protocol) == (name in report.populations)


def test_networks_of_a_foreign_module_are_not_compared(canonical):
    zoo = tiny_zoo()
    _, report = canonical(Zoo({"inr": replace(zoo["inr"], architecture=None)}))
    assert report.populations["inr"].max_relative_change is None
    assert report.populations["inr"].compared == 0


# -- rows without a canonical form -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_bad_rows_stay_as_they_are_and_are_counted(canonical, method):
    zoo = trajectories()
    weights = zoo["inr"].weights.copy()
    weights[17, 5] = np.nan  # the last checkpoint of network 1
    weights[[2, 10, 18], 0] = np.inf  # all of network 2
    weights[4] = 1e25  # finite, but of no finite length
    bad = [2, 4, 10, 17, 18]
    diverged = Zoo({"inr": replace(zoo["inr"], weights=weights)})
    written, report = canonical(diverged, method, block=4)
    np.testing.assert_array_equal(written["inr"].weights[bad], weights[bad])
    assert report.populations["inr"].kept == len(bad)
    assert np.isfinite(report.populations["inr"].max_relative_change)
    if method == "sort":  # network 1 goes by its second checkpoint
        expected, _ = zoo["inr"].spec.canonicalize(zoo["inr"].weights_of(9))
        assert torch.equal(written["inr"].read(9), zoo["inr"].spec.flatten(expected))
    assert canonical(written, method, "again.h5")[1].digest == report.digest


def test_weights_that_would_overflow_their_type_stay_as_they_are(canonical):
    zoo = relu_zoo()
    spec, weights = zoo["mlp"].spec, zoo["mlp"].weights.copy()
    layers = spec.unflatten(torch.from_numpy(weights))
    layers["layers.0.weight"][3] *= 1000.0
    layers["layers.1.weight"][3] *= 1000.0
    half = in_dtype(Zoo({"mlp": replace(zoo["mlp"], weights=spec.flatten(layers).numpy())}), "float16")
    written, report = canonical(half)
    np.testing.assert_array_equal(written["mlp"].weights[3], half["mlp"].weights[3])
    assert (report.populations["mlp"].kept, report.populations["mlp"].moved) == (1, 11)
    assert canonical(written, name="again.h5")[1].digest == report.digest


@pytest.mark.parametrize("block", [1, 7, None])
def test_a_network_with_a_checkpoint_that_would_overflow_stays_whole(canonical, block):
    zoo = relu_zoo(networks=6)
    spec, last = zoo["mlp"].spec, zoo["mlp"].weights
    dead = spec.unflatten(torch.from_numpy(last.copy()))
    dead["layers.0.weight"][2, 4] = 1e-39  # the unit has died since; the factor that brings it to 1
    dead["layers.0.bias"][2, 4] = 0.0
    population = replace(
        zoo["mlp"],
        weights=np.concatenate([last, spec.flatten(dead).numpy()]),
        network=np.tile(zoo["mlp"].network, 2),
        step=np.repeat(np.arange(2, dtype=np.int64), 6),
    )
    written, report = canonical(Zoo({"mlp": population}), block=block)
    same = (written["mlp"].weights == population.weights).all(1)
    assert np.flatnonzero(same).tolist() == [2, 8]
    assert (report.populations["mlp"].kept, report.populations["mlp"].moved) == (2, 10)
    _, again = canonical(written, name="again.h5")
    assert again.digest == report.digest
    assert again.populations["mlp"].kept == 2


# -- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2, 7, "the end"])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_call_goes_on_where_it_stopped(canonical, tmp_path, monkeypatch, method, at):
    zoo = Zoo({"a": tiny_zoo()["inr"], "b": tiny_zoo(hidden=(6,))["inr"]})
    _, whole = canonical(zoo, method, "whole.h5", block=9)
    append, finish = RowStore.append, RowStore.finish
    appended = []

    def stopping(store, rows, notes=()):
        if len(appended) == at:
            raise KeyboardInterrupt
        append(store, rows, notes)
        appended.append(sum(map(len, rows.values())))

    def stopped(store, make):
        raise KeyboardInterrupt

    monkeypatch.setattr(RowStore, "append", stopping)
    monkeypatch.setattr(RowStore, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        canonical(zoo, method, block=9)
    assert not (tmp_path / "out.h5").exists()
    monkeypatch.setattr(RowStore, "finish", finish)
    at = None
    _, report = canonical(zoo, method, block=9)
    assert report.digest == whole.digest
    assert report.populations == whole.populations
    assert sum(appended) == 80
    assert not (tmp_path / "out.h5.parts").exists()


def test_other_work_does_not_go_on(canonical, tmp_path, monkeypatch):
    def stopped(store, make):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            canonical(tiny_zoo(), "align")
    for difference, zoo, options in (
        ('method: "align" there, "sort" now', tiny_zoo(), {"method": "sort"}),
        ("seed: 0 there, 1 now", tiny_zoo(), {"seed": 1}),
        (r'reference: \{"inr":0\} there, \{"inr":3\} now', tiny_zoo(), {"reference": 3}),
        ("symmetries: .* there, .* now", tiny_zoo(), {"symmetries": ["sign"]}),
        ('zoo: "sha256.* now', Zoo({"inr": replace(tiny_zoo()["inr"], labels={})}), {}),
    ):
        with pytest.raises(OutputError, match=f"holds the beginning of other work .{difference}.; choose"):
            canonical(zoo, **{"method": "align", **options})
    _, report = canonical(tiny_zoo(), overwrite=True)
    assert report.method == "sort"


# -- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "shuffle"}, ConfigError, "method: expected one of sort, align, found 'shuffle'"),
        ({"reference": 0}, ConfigError, "reference: only method 'align' has one, found 0 with method 'sort'"),
        ({"symmetries": ["sign"]}, ConfigError, "symmetries: only method 'align' has one"),
        ({"method": "align", "symmetries": []}, ConfigError, "permutation, sign, phase, found none"),
        (
            {"method": "align", "symmetries": ["positive"]},
            ConfigError,
            "population 'inr' can be aligned by permutation, sign, phase, found 'positive'",
        ),
        ({"method": "align", "reference": 40}, ConfigError, r"population 'inr', 0 .. 39, found 40"),
        ({"method": "align", "reference": -1}, ConfigError, r"population 'inr', 0 .. 39, found -1"),
        (
            {"method": "align", "reference": 3},
            ConfigError,
            "reference: row 3 of population 'inr' has weights that are not finite",
        ),
        ({"population": "cnn"}, ZooError, "population: expected one of inr, found 'cnn'"),
        ({"population": []}, ConfigError, "population: expected at least one, found none"),
        ({"seed": -1}, ConfigError, "seed: expected at least 0, found -1"),
        ({"block": 0}, ConfigError, "block: expected at least 1, found 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, options, error, message):
    zoo = tiny_zoo()
    zoo["inr"].weights[3, 0] = np.nan
    with pytest.raises(error, match=message):
        canonicalize_zoo(zoo, tmp_path / "out.h5", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_symmetry_that_one_population_lacks_is_refused(tmp_path):
    zoo = Zoo({"inr": tiny_zoo()["inr"], "relu": relu_zoo()["mlp"]})
    with pytest.raises(ConfigError, match="population 'relu' can be aligned by permutation, found 'sign'"):
        canonicalize_zoo(zoo, tmp_path / "out.h5", method="align", symmetries="sign", progress=False)
    with pytest.raises(ConfigError, match="population: expected one with a reference, found inr, relu"):
        canonicalize_zoo(zoo, tmp_path / "out.h5", method="align", reference=0, progress=False)


def test_a_population_without_finite_rows_has_no_reference_but_may_be_sorted(canonical, tmp_path):
    zoo = tiny_zoo()
    nothing = Zoo({"inr": replace(zoo["inr"], weights=np.full_like(zoo["inr"].weights, np.nan))})
    with pytest.raises(ConfigError, match="reference: population 'inr' has no row with finite weights"):
        canonicalize_zoo(nothing, tmp_path / "out.h5", method="align", progress=False)
    written, report = canonical(nothing)
    assert (report.populations["inr"].kept, report.populations["inr"].compared) == (40, 0)
    np.testing.assert_array_equal(written["inr"].weights, nothing["inr"].weights)


def test_recurrent_networks_are_aligned(tmp_path):
    net = RNN(in_features=2, hidden=4, out_features=1, sequence="floats")
    spec = spec_of(net)
    first = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    element = spec.random_element(generator=torch.Generator().manual_seed(1), symmetries=["permutation"])
    zoo = Zoo.from_state_dicts([first, spec.act(element, first)], spec=spec, name="rnn")
    canonicalize_zoo(zoo, tmp_path / "out.h5", method="align", reference=0, progress=False)
    rows = Zoo.open(tmp_path / "out.h5")["rnn"].weights
    np.testing.assert_array_equal(rows[1], rows[0])


def test_a_spec_that_matching_does_not_support_is_refused_before_work(tmp_path):
    tensors = {"cube": TensorSpec.dense((3, 3, 3), ["units"] * 3)}
    spec = WeightSpec.build([Group("units", 3)], tensors)
    zoo = Zoo.from_state_dicts([{"cube": torch.rand(3, 3, 3)}], spec=spec, name="cubes")
    with pytest.raises(SpecError, match="not supported by weight_matching"):
        canonicalize_zoo(zoo, tmp_path / "out.h5", method="align", progress=False)
    assert list(tmp_path.iterdir()) == []
    canonicalize_zoo(zoo, tmp_path / "out.h5", method="sort", progress=False)


def test_outputs_that_are_taken_are_refused(tmp_path):
    path = tiny_zoo().save(tmp_path / "zoo.h5")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"zoo.h5 is the zoo itself; choose another name"):
            canonicalize_zoo(path, tmp_path / "." / "zoo.h5", overwrite=overwrite, progress=False)
    tiny_zoo(seed=1).save(tmp_path / "old.h5")
    with pytest.raises(OutputError, match=r"old.h5 exists already; choose another name or pass --overwrite"):
        canonicalize_zoo(path, tmp_path / "old.h5", progress=False)
    with pytest.raises(OutputError, match=r"directory .*nowhere does not exist"):
        canonicalize_zoo(path, tmp_path / "nowhere" / "out.h5", progress=False)
    report = canonicalize_zoo(path, tmp_path / "old.h5", overwrite=True, progress=False)
    assert Zoo.open(tmp_path / "old.h5").digest == report.digest
    assert Zoo.open(path).digest == tiny_zoo().digest


def test_zoos_that_are_missing_or_damaged_are_refused(tmp_path):
    with pytest.raises(ZooError, match=r"missing.h5: file not found"):
        canonicalize_zoo(tmp_path / "missing.h5", tmp_path / "out.h5")
    path = tiny_zoo().save(tmp_path / "zoo.h5")
    offset = Zoo.open(path)["inr"].weights.offset
    content = bytearray(Path(path).read_bytes())
    content[offset + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ZooError, match=r"zoo.h5: content is damaged: digest should be"):
        canonicalize_zoo(path, tmp_path / "out.h5")
    path.write_bytes(content[: offset + 100])
    with pytest.raises(ZooError, match=r"zoo.h5: .*truncated"):
        canonicalize_zoo(path, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()
