"""``generate --shards``, ``join``, ``plan`` and engines, as commands."""

import pytest

from weightspace.zoo import Zoo

SMALL = [
    word
    for setting in ("source.size=8", "network.hidden=[8]", "protocol.steps=20", "shard=3")
    for word in ("--set", setting)
]
RECIPE = ["digits-inr", "--count", "8", "--seed", "0", *SMALL]


@pytest.fixture
def whole(document, tmp_path):
    return document("generate", *RECIPE, "-o", tmp_path / "whole.h5")


def test_parts_then_join(call, document, refuse, tmp_path, whole):
    output = tmp_path / "zoo.h5"
    first = document("generate", *RECIPE, "-o", output, "--shards", "1/2")
    assert (first["joined"], first["digest"], first["median"]) == (False, None, None)
    assert (first["shards_done"], first["shards"], first["trained"]) == (2, 3, 5)
    message = refuse("join", output)
    assert "1 of 3 shards are missing" in message
    assert f"(shard-00001.h5); `weightspace generate digits-inr -o {output}`" in message
    code, out, _ = call("generate", *RECIPE, "-o", output, "--shards", "2/2", "--quiet")
    assert (code, out) == (0, "")
    code, out, _ = call("generate", *RECIPE, "-o", output, "--shards", "2/2")
    assert f"{output}.parts: 3 of 3 shards done; nothing left to train" in out
    assert f"weightspace join {output}" in out
    joined = document("join", output)
    assert set(joined) == set(first)
    assert (joined["joined"], joined["digest"], joined["networks"]) == (True, whole["digest"], 8)
    assert not (tmp_path / "zoo.h5.parts").exists()


def test_finished_zoos_are_joined(call, document, refuse, tmp_path, whole):
    other, output = tmp_path / "other.h5", tmp_path / "both.h5"
    document("generate", *RECIPE, "-o", other, "--seed", "1")
    found = document("join", tmp_path / "whole.h5", other, "-o", output)
    assert (found["networks"], found["digest"]) == (16, Zoo.open(output).digest)
    assert "exists already" in refuse("join", tmp_path / "whole.h5", other, "-o", output)
    code, out, _ = call("join", tmp_path / "whole.h5", other, "-o", output, "--overwrite")
    assert (code, out.splitlines()[0]) == (0, f"{output}: 16 networks of 2 zoos")
    assert "expected -o OUT.h5 with 2 zoos" in refuse("join", other, output)
    assert "expected at least two zoos, found 1" in refuse("join", other, "-o", tmp_path / "x.h5")
    assert "is no folder of shards" in refuse("join", other)


@pytest.mark.parametrize("text", ["0/4", "5/4", "x"])
def test_parts_that_do_not_exist_are_one_line(refuse, tmp_path, text):
    message = refuse("generate", *RECIPE, "-o", tmp_path / "zoo.h5", "--shards", text)
    assert message.startswith("shards: expected I/N with I from 1 to N")
    assert message.endswith(f"found '{text}'")


def test_engines_that_are_not_there_are_one_line(refuse, tmp_path):
    place = ["-o", tmp_path / "zoo.h5"]
    assert "engine: expected one of local, ray, found 'x'" in refuse(
        "generate", *RECIPE, *place, "--engine", "x"
    )
    assert "address: expected none" in refuse("generate", *RECIPE, *place, "--address", "localhost:1")
    assert list(tmp_path.iterdir()) == []


def test_plan_says_what_generate_would_do(call, document, refuse, tmp_path, whole):
    found = document("plan", *RECIPE, "-o", tmp_path / "zoo.h5")
    assert (found["networks"], found["rows"], found["shards"]) == (8, 8, 3)
    assert found["parameters"] == [33, 33, 33]
    assert found["folder"] == str(tmp_path.resolve())
    assert min(found["seconds"], found["memory_bytes"], found["free_bytes"]) > 0
    code, out, _ = call("plan", *RECIPE)
    assert code == 0
    assert "networks    8 in 3 shards\n" in out
    assert "unknown key" in refuse("plan", "digits-inr", "--set", "spede=1")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.h5"]
