"""The run directory: what ``overwrite`` deletes and what it never does; where evaluations go."""

import json
import shutil

import pytest

from weightspace.errors import OutputError
from weightspace.tasks import evaluate, train, train_config
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


@pytest.fixture(scope="module")
def original(zoo, tmp_path_factory):
    run = tmp_path_factory.mktemp("original") / "run"
    fit(config_of(zoo), run)
    return run


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def config_of(zoo, **values):
    values = {"zoo": str(zoo), "model": "mlp", "epochs": 1, "batch_size": 8, **values}
    return train_config(values, {"model.hidden": [8]})


def fit(config, run, **options):
    return train(config, run, device="cpu", progress=False, **options)


def files(run):
    return {
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }


def test_overwrite_deletes_what_runs_write_and_nothing_else(zoo, run):
    written = files(run)
    evaluate(run, device="cpu")
    evaluated = files(run) - written
    assert evaluated == {"evaluation-test.json", "test.png"}
    for name in ("predictions.csv", "notes/todo.txt", "checkpoints/precious.h5", "edited.h5", "mine.png"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("precious")
    events = set(run.rglob("*tfevents*"))
    fit(config_of(zoo, seed=1), run, overwrite=True)
    mine = {"predictions.csv", "notes/todo.txt", "checkpoints/precious.h5", "edited.h5", "mine.png"}
    assert files(run) == written | mine
    assert all((run / name).read_text() == "precious" for name in mine)
    assert not events & set(run.rglob("*tfevents*"))


def test_a_zoo_inside_the_run_is_never_deleted(zoo, run, tmp_path):
    inside = run / "tensorboard" / "events.out.tfevents.h5"
    shutil.copy(zoo, inside)
    (tmp_path / "link.h5").symlink_to(inside)
    before = files(run)
    for path in (inside, tmp_path / "link.h5"):
        with pytest.raises(OutputError, match=r"run holds the zoo .* itself; choose another name"):
            fit(config_of(path), run, overwrite=True)
    assert files(run) == before
    assert inside.read_bytes() == zoo.read_bytes()


def test_a_run_behind_a_link_is_replaced_and_the_link_stays(zoo, run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run)
    fit(config_of(zoo, seed=1), link, overwrite=True)
    assert link.is_symlink()
    assert "seed: 1" in (run / "config.yaml").read_text()


def test_one_zoo_has_several_paths(zoo, run, monkeypatch):
    monkeypatch.chdir(zoo.parent)
    assert fit(config_of("zoo.h5"), run).epochs == 1
    shutil.copy(zoo, "other.h5")
    with pytest.raises(OutputError, match=r"\(zoo: .* there, 'other\.h5' now\)"):
        fit(config_of("other.h5"), run)


def test_scores_on_another_zoo_or_population_have_names_of_their_own(zoo, run, tmp_path):
    own = evaluate(run, device="cpu")
    opened, inr = Zoo.open(zoo), tiny_zoo(networks=60, seed=5)["inr"]
    other = Zoo({"inr": inr, "more": inr}, opened.sources).save(tmp_path / "mine.h5")
    digest = Zoo.open(other).digest.removeprefix("sha256:")[:8]
    copied = shutil.copy(zoo, tmp_path / "copy.h5")
    assert evaluate(run, copied, device="cpu").figure == own.figure == run / "test.png", "the same networks"
    names = {f"test-mine-{digest}-inr", f"test-mine-{digest}-more"}
    for population in ("inr", "more"):
        report = evaluate(run, other, population=population, device="cpu")
        assert report.figure.stem in names
        document = json.loads((run / f"evaluation-{report.figure.stem}.json").read_text())
        assert (document["zoo"], document["figure"]) == (str(other), report.figure.name)
    assert {path.name for path in run.glob("evaluation-*")} == {
        "evaluation-test.json",
        *(f"evaluation-{name}.json" for name in names),
    }
    assert json.loads((run / "evaluation-test.json").read_text())["zoo"] == str(copied)
    fit(config_of(zoo), run, overwrite=True)
    assert not list(run.glob("evaluation-*"))
    assert not list(run.glob("test*"))
