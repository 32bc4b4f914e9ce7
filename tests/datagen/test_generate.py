"""Generation: what a zoo holds, and that no interruption, damage or division into shards changes a bit."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from weightspace.datagen import _generate, generate, load_recipe
from weightspace.datagen.sources import Digits
from weightspace.errors import DataError, DeviceError, OutputError, RecipeError
from weightspace.zoo import Zoo, render, verify_digest

SMALL = {"source.size": 8, "network.hidden": [8], "protocol.steps": 20, "shard": 3}


def make(output, *, count=8, changes=None, **options):
    settings = {"views": 1, "seed": 0, "progress": False, **options}
    return generate("digits-inr", output, count=count, overrides={**SMALL, **(changes or {})}, **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The digest of 8 networks in shards of 3 that nothing interrupted."""
    return make(tmp_path_factory.mktemp("undisturbed") / "zoo.h5").digest


def parts_of(output):
    return output.with_name(output.name + ".parts")


# -- content -----------------------------------------------------------------------------------------------


def test_what_a_zoo_holds(tmp_path, undisturbed):
    report = make(tmp_path / "zoo.h5")
    zoo = Zoo.open(report.output)
    assert report.digest == zoo.digest == verify_digest(report.output) == undisturbed
    assert (report.networks, report.trained, report.diverged) == (8, 8, 0)
    assert report.networks_per_second == pytest.approx(8 / report.seconds)
    inr = zoo["inr"]
    assert (inr.rows, inr.spec.num_parameters) == (8, 2 * 8 + 8 + 8 + 1)
    assert inr.step.tolist() == [20] * 8
    signals = Digits(size=8).load(None)
    assert inr.labels["label"].tolist() == signals.labels[inr.source].tolist()
    np.testing.assert_array_equal(zoo.sources["digits"].get(inr.source) * 255, signals.items[inr.source])
    assert len(set(inr.source.tolist())) == 8
    assert zoo.recipe == load_recipe("digits-inr", {**SMALL, "count": 8}).resolved()
    assert inr.protocol["initialisation"] == "independent"
    assert (inr.protocol["w0"], inr.protocol["w0_absorbed"], inr.protocol["output_offset"]) == (
        30.0,
        False,
        0.0,
    )
    assert inr.architecture["arguments"]["output_offset"] == 0.0
    assert not parts_of(report.output).exists()


def test_stored_psnr_is_that_of_the_rendered_networks(tmp_path):
    zoo = Zoo.open(make(tmp_path / "zoo.h5", count=6, changes={"protocol.steps": 60}).output)
    inr, rows = zoo["inr"], np.arange(6)
    rendered = torch.from_numpy(render(inr, rows, (8, 8)))
    targets = torch.from_numpy(zoo.sources["digits"].get(inr.source[inr.network]))
    for row in rows:
        psnr = -10 * torch.log10(mse_loss(rendered[row], targets[row]))
        assert float(inr.metrics["psnr"][row]) == pytest.approx(float(psnr), abs=1e-3)
    assert inr.metrics["psnr"].min() > 5


def test_training_stops_at_the_target(tmp_path):
    changes = {
        "protocol": "dws",
        "protocol.steps": 400,
        "protocol.target_psnr": 14.0,
        "protocol.learning_rate": 3e-3,
    }
    inr = Zoo.open(make(tmp_path / "zoo.h5", changes=changes).output)["inr"]
    assert inr.metrics["psnr"].min() >= 14.0
    assert inr.step.max() < 400


def test_views_of_one_item_share_its_split_and_label(tmp_path):
    changes = {"split.val": 0.3, "split.test": 0.3, "protocol.steps": 1}
    inr = Zoo.open(make(tmp_path / "zoo.h5", count=9, views=3, changes=changes).output)["inr"]
    assert inr.networks == 27
    for item in np.unique(inr.source):
        of_item = inr.source == item
        assert sorted(inr.view[of_item].tolist()) == [0, 1, 2]
        assert len(np.unique(inr.split[of_item])) == 1
        assert len(np.unique(inr.labels["label"][of_item])) == 1
        assert len(np.unique(inr.weights[of_item], axis=0)) == 3
    assert np.bincount(inr.split).tolist() == [12, 6, 9]


def test_shared_initialisation_is_shared_within_a_view(tmp_path):
    """One step with a learning rate of almost nothing leaves the initial parameters."""
    still = {"protocol.steps": 1, "protocol.learning_rate": 1e-12, "initialisation": "shared"}
    shared = Zoo.open(make(tmp_path / "shared.h5", count=5, views=2, changes=still).output)["inr"]
    first, second = (shared.weights[shared.view == view] for view in (0, 1))
    np.testing.assert_allclose(first, np.broadcast_to(first[0], first.shape), atol=1e-9)
    np.testing.assert_allclose(second, np.broadcast_to(second[0], second.shape), atol=1e-9)
    assert np.abs(first[0] - second[0]).max() > 0.01
    assert shared.protocol["initialisation"] == "shared"
    still["initialisation"] = "independent"
    independent = Zoo.open(make(tmp_path / "independent.h5", count=5, views=2, changes=still).output)["inr"]
    gaps = np.abs(independent.weights[:, None] - independent.weights[None]).max(-1)
    assert gaps[~np.eye(10, dtype=bool)].min() > 0.01


@pytest.mark.parametrize("preset", ["dws", "siren"])
def test_initial_parameters_fill_their_bounds(tmp_path, preset):
    still = {"protocol": {"preset": preset, "steps": 1, "learning_rate": 1e-12}, "network.hidden": [64]}
    zoo = Zoo.open(make(tmp_path / "zoo.h5", count=40, changes={**still, "shard": 64}).output)
    weights = zoo["inr"].weights_of(slice(None))
    bounds = {"dws": (3**0.5 / 30, 0.0), "siren": (0.5, 0.0)}[preset]
    for name, bound in zip(("layers.0.weight", "layers.0.bias"), bounds, strict=True):
        assert weights[name].abs().max() <= bound + 1e-7
        assert weights[name].abs().max() >= 0.98 * bound
        assert weights[name].std() == pytest.approx(bound / 3**0.5, rel=0.05, abs=1e-9)
    assert weights["layers.1.weight"].abs().max() <= (6 / 64) ** 0.5 / 30 + 1e-7


def test_the_seed_decides_items_and_parameters(tmp_path):
    zoos = [Zoo.open(make(tmp_path / f"{seed}.h5", seed=seed).output)["inr"] for seed in (0, 1)]
    assert zoos[0].source.tolist() != zoos[1].source.tolist()
    assert np.abs(zoos[0].weights - zoos[1].weights).max() > 0.01


def test_more_items_leave_the_first_ones_as_they_were(tmp_path):
    few, more = (Zoo.open(make(tmp_path / f"{count}.h5", count=count).output)["inr"] for count in (4, 8))
    assert few.source.tolist() == more.source.tolist()[:4]
    np.testing.assert_array_equal(few.weights, more.weights[:4])


@pytest.mark.parametrize("shard", [1, 7, 256])
def test_shards_decide_nothing(tmp_path, shard, undisturbed):
    assert make(tmp_path / "zoo.h5", changes={"shard": shard}).digest == undisturbed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_the_rounded_float32(tmp_path, dtype):
    full = Zoo.open(make(tmp_path / "full.h5").output)["inr"]
    half = Zoo.open(make(tmp_path / "half.h5", changes={"dtype": dtype}).output)["inr"]
    assert half.weights.dtype.itemsize == 2
    rounded = full.read(slice(None)).to(getattr(torch, dtype)).float()
    assert torch.equal(half.read(slice(None)), rounded)


def test_official_test_items_stay_test_items(tmp_path, data_root):
    changes = {"network.hidden": [8], "protocol.steps": 1, "split.val": 0.25}
    report = generate(
        "mnist-inr", tmp_path / "zoo.h5", count=80, data_root=data_root, overrides=changes, progress=False
    )
    inr = Zoo.open(report.output)["inr"]
    np.testing.assert_array_equal(inr.split == 2, inr.source >= 60000)
    training = inr.split[inr.source < 60000]
    assert (training == 1).sum() == round(0.25 * len(training))


# -- interruption ------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopError])
@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, undisturbed, after, error):
    """The bar of tqdm is what a user sees; here it raises once ``after`` networks are finished."""

    class Bar(_generate.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n >= after:
                raise error

    output = tmp_path / "zoo.h5"
    with monkeypatch.context() as patch:
        patch.setattr(_generate, "tqdm", Bar)
        with pytest.raises(error):
            make(output, progress=True)
    assert not output.exists()
    finished = sorted(path.name for path in parts_of(output).glob("*.h5"))
    assert finished == [f"shard-{number:05d}.h5" for number in range((after - 1) // 3)]
    before = {path: path.stat().st_mtime_ns for path in parts_of(output).glob("*.h5")}
    report = make(output)
    assert report.digest == undisturbed == verify_digest(output)
    assert report.trained == 8 - 3 * len(before)
    assert list(tmp_path.iterdir()) == [output]


@pytest.fixture
def almost_done(tmp_path, monkeypatch):
    """An output whose first two shards of three are finished."""

    class Bar(_generate.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n >= 7:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_generate, "tqdm", Bar)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "zoo.h5", progress=True)
    return tmp_path / "zoo.h5"


@pytest.mark.parametrize("damage", ["a flipped byte", "truncated", "empty", "another file"])
def test_a_damaged_shard_is_made_again(almost_done, undisturbed, damage):
    shard = parts_of(almost_done) / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    if damage == "a flipped byte":
        content[Zoo.open(shard)["inr"].weights.offset + 17] ^= 4
    elif damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    else:
        content = bytearray(b"something else entirely")
    shard.write_bytes(content)
    report = make(almost_done)
    assert report.digest == undisturbed
    assert report.trained == 2 + 3


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, undisturbed):
    """SIGKILL gives no process the time to tidy up."""
    output = tmp_path / "zoo.h5"
    code = f"""
import sys, time
from weightspace.datagen import _generate, generate
class Bar(_generate.tqdm):
    def update(self, n=1):
        super().update(n)
        if self.n >= 5:
            print("now", flush=True)
            time.sleep(60)
_generate.tqdm = Bar
generate("digits-inr", sys.argv[1], count=8, views=1, seed=0, overrides={SMALL!r})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout.readline() == "now\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    report = make(output)
    assert report.digest == undisturbed
    assert report.trained == 5
    assert list(tmp_path.iterdir()) == [output]


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path, undisturbed):
    output = tmp_path / "zoo.h5"
    parts_of(output).mkdir()
    (parts_of(output) / ".recipe.json.123.tmp").write_text("{")
    assert make(output).digest == undisturbed


# -- outputs that are there already ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, r"seed: 0 there, 1 now"),
        ({"count": 9}, r"count: 8 there, 9 now"),
        ({"changes": {"protocol.steps": 21}}, r'protocol: \{.*"steps":20.*\} there, \{.*"steps":21.*\} now'),
        ({"changes": {"shard": 4}}, r"shard: 3 there, 4 now"),
    ],
)
def test_shards_of_another_recipe_are_refused_and_kept(almost_done, undisturbed, change, difference):
    with pytest.raises(OutputError, match=rf"zoo\.h5\.parts holds shards of another recipe \({difference}\)"):
        make(almost_done, **change)
    assert make(almost_done).digest == undisturbed


def test_shards_of_another_recipe_give_way_when_told(almost_done, undisturbed):
    report = make(almost_done, seed=1, overwrite=True)
    assert report.trained == 8
    assert report.digest != undisturbed


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"recipe": 1, "shard": 3, "device": "cpu"}', "\xff"])
def test_a_damaged_record_of_the_recipe_is_refused(almost_done, text):
    (parts_of(almost_done) / "recipe.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(OutputError, match=r"holds shards of another recipe \(its recipe\.json is damaged\)"):
        make(almost_done)


def test_a_strangers_folder_is_left_alone(tmp_path):
    output = tmp_path / "zoo.h5"
    parts_of(output).mkdir()
    (parts_of(output) / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"zoo\.h5\.parts is no folder of shards"):
            make(output, overwrite=overwrite)
    assert (parts_of(output) / "thesis.txt").read_text() == "precious"


def test_a_finished_zoo_is_not_made_again(tmp_path):
    first = make(tmp_path / "zoo.h5")
    content, when = first.output.read_bytes(), first.output.stat().st_mtime_ns
    again = make(tmp_path / "zoo.h5", changes={"shard": 5})
    assert (again.trained, again.networks_per_second) == (0, 0.0)
    assert (again.digest, again.networks, again.median) == (first.digest, 8, first.median)
    assert (first.output.read_bytes(), first.output.stat().st_mtime_ns) == (content, when)


def test_a_finished_zoo_of_another_recipe_is_refused(tmp_path):
    output = make(tmp_path / "zoo.h5").output
    before = output.read_bytes()
    with pytest.raises(OutputError, match=r"zoo\.h5 exists already and was not made by this recipe"):
        make(output, seed=1)
    assert output.read_bytes() == before
    assert make(output, seed=1, overwrite=True).trained == 8
    assert Zoo.open(output).recipe["seed"] == 1


def test_other_files_in_the_way_are_refused(tmp_path):
    (tmp_path / "zoo.h5").write_text("notes")
    with pytest.raises(OutputError, match="was not made by this recipe"):
        make(tmp_path / "zoo.h5")
    assert (tmp_path / "zoo.h5").read_text() == "notes"
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a directory, expected the name of a file"):
            make(tmp_path, overwrite=overwrite)
    with pytest.raises(OutputError, match=r"output: directory .* does not exist"):
        make(tmp_path / "missing" / "zoo.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.h5"]


# -- refusals ----------------------------------------------------------------------------------------------


def test_what_cannot_be_made_is_refused_before_work_starts(tmp_path):
    cases = [
        ({"count": 1798}, RecipeError, "count: the data set has 1797 items, found 1798; raise views"),
        ({"count": 0}, RecipeError, "count: input should be greater than or equal to 1, found 0"),
        (
            {"changes": {"split.method": "official"}},
            RecipeError,
            r"split\.method: the source 'digits' has no official split",
        ),
        (
            {"changes": {"split.val": 0.5, "split.test": 0.5}},
            RecipeError,
            "val and test leave nothing to train on",
        ),
        ({"device": "tpu"}, DeviceError, "device: expected auto, cpu or cuda, found 'tpu'"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            make(tmp_path / "zoo.h5", **options)
    with pytest.raises(DataError, match="pass --data-root DIR with the files"):
        generate("mnist-inr", tmp_path / "zoo.h5", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(DeviceError, match="cuda was asked for, but PyTorch finds no CUDA device"):
        make(tmp_path / "zoo.h5", device="cuda")


def test_a_recipe_in_memory_serves_as_well(tmp_path, undisturbed):
    recipe = load_recipe("digits-inr", SMALL)
    report = generate(recipe, tmp_path / "zoo.h5", count=8, views=1, seed=0, progress=False)
    assert report.digest == undisturbed


def test_progress_goes_to_standard_error(tmp_path, capsys):
    make(tmp_path / "zoo.h5", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "digits-inr: 100%" in captured.err
    assert "8/8" in captured.err
    make(tmp_path / "quiet.h5")
    assert capsys.readouterr() == ("", "")


def test_reports_know_diverged_networks(tmp_path):
    report = make(tmp_path / "zoo.h5", changes={"protocol.learning_rate": 1e38, "network.activation": "relu"})
    assert report.diverged == 8
    assert np.isnan(report.median)
    assert np.isnan(Zoo.open(report.output)["inr"].metrics["psnr"]).all()
