"""Joining in one pass: what is damaged is found, blocks decide nothing, and items stay in one split."""

from dataclasses import replace

import numpy as np
import pytest

from weightspace.errors import OutputError, ZooError
from weightspace.testing import tiny_zoo
from weightspace.zoo import Source, Zoo, _join, join_finished, join_zoos, verify_digest


@pytest.fixture
def parts(tmp_path):
    """Three zoos of 7, 1 and 4 networks."""
    zoos = [Zoo({"inr": tiny_zoo(networks=size)["inr"]}) for size in (7, 1, 4)]
    return [zoo.save(tmp_path / f"{number}.h5") for number, zoo in enumerate(zoos)]


@pytest.mark.parametrize("block", [1, 7, 1000, 2**21])
def test_blocks_decide_nothing(parts, tmp_path, monkeypatch, block):
    monkeypatch.setattr(_join, "BLOCK", block)
    digest = join_zoos(parts, tmp_path / "joined.h5", recipe={"a": 1})
    joined = Zoo.open(tmp_path / "joined.h5")
    assert digest == joined.digest == verify_digest(tmp_path / "joined.h5")
    weights = [Zoo.open(part)["inr"].weights for part in parts]
    np.testing.assert_array_equal(joined["inr"].weights, np.concatenate(weights))
    assert joined["inr"].network.tolist() == list(range(12))


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_damaged_part_is_found_while_it_is_read(parts, tmp_path, part, share):
    weights = Zoo.open(parts[part])["inr"].weights
    content = bytearray(parts[part].read_bytes())
    content[weights.offset + int(share * weights.nbytes)] ^= 1
    parts[part].write_bytes(content)
    with pytest.raises(ZooError, match=rf"zoo .*{part}\.h5: content is damaged: digest should be sha256:"):
        join_zoos(parts, tmp_path / "joined.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.h5", "1.h5", "2.h5"]


def with_items(items, splits, contents=None):
    """A zoo with one network for each of some items of a source."""
    inr = tiny_zoo(networks=len(items))["inr"]
    inr = replace(inr, source=np.array(items, np.int64), split=np.array(splits, np.uint8))
    index = np.unique(items)
    values = index if contents is None else np.array(contents)
    pictures = np.broadcast_to(values[:, None, None], (len(index), 2, 2)).astype(np.uint8)
    return Zoo({"inr": inr}, {"digits": Source(pictures, index)}, {"seed": 0})


def test_items_of_several_zoos_keep_the_split_of_the_first(tmp_path):
    zoos = [with_items([4, 2, 9], [0, 1, 2]), with_items([9, 5, 2], [0, 2, 0])]
    paths = [zoo.save(tmp_path / f"{number}.h5") for number, zoo in enumerate(zoos)]
    digest = join_finished(paths, tmp_path / "joined.h5")
    joined = Zoo.open(tmp_path / "joined.h5")
    assert joined.digest == digest == verify_digest(tmp_path / "joined.h5")
    assert joined["inr"].source.tolist() == [4, 2, 9, 9, 5, 2]
    assert joined["inr"].split.tolist() == [0, 1, 2, 2, 2, 1]
    assert joined.sources["digits"].index.tolist() == [2, 4, 5, 9]
    assert joined.sources["digits"].items[:, 0, 0].tolist() == [2, 4, 5, 9]
    assert joined.recipe == {"seed": 0}


def test_networks_that_represent_no_items_are_renumbered(tmp_path):
    zoos = [
        replace(with_items(items, [0] * 3), sources={}, recipe={"seed": seed})
        for seed, items in enumerate([[0, 1, 2], [1, 2, 0]])
    ]
    paths = [zoo.save(tmp_path / f"{number}.h5") for number, zoo in enumerate(zoos)]
    join_finished(paths, tmp_path / "joined.h5")
    joined = Zoo.open(tmp_path / "joined.h5")
    assert joined["inr"].source.tolist() == [0, 1, 2, 4, 5, 3]
    assert (joined.sources, joined.recipe) == ({}, None)


def test_finished_zoos_that_do_not_belong_together_are_refused(tmp_path):
    first = with_items([4, 2], [0, 0]).save(tmp_path / "first.h5")
    copy = Zoo.open(first).save(tmp_path / "copy.h5")
    other = with_items([4, 3], [0, 0], contents=[3, 77]).save(tmp_path / "other.h5")
    output = tmp_path / "joined.h5"
    for paths, message in [
        ([first], "join: expected at least two zoos, found 1"),
        ([first, copy], r"join: .*copy\.h5 holds the same networks as .*first\.h5"),
        ([first, first], "holds the same networks as"),
        (
            [first, other],
            r"zoo .*other\.h5: item 4 of source 'digits' is another one than in the zoos before",
        ),
        ([first, tmp_path / "no.h5"], r"no\.h5: file not found"),
    ]:
        with pytest.raises(ZooError, match=message):
            join_finished(paths, output)
    with pytest.raises(OutputError, match="exists already"):
        join_finished([first, other], first)
    assert not output.exists()
