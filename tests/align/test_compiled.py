"""Matching in compiled code: it finds what operations on whole batches find, on any thread of any process."""

import multiprocessing
import subprocess
import sys

import pytest
import torch

from weightspace.align import _compiled, _sweeps, _threads, weight_matching
from weightspace.spec import WeightSpec
from weightspace.testing import random_weights

from .test_weight_matching import ALL, convolutional_spec

DOUBLE = torch.float64
KINDS = ("permutation", "sign", "phase")


@pytest.fixture
def batched(monkeypatch):
    """A way to match without compiled code."""

    def match(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(_compiled, "can_match", lambda problem: False)
            return weight_matching(*arguments, **options)

    return match


def test_which_way_is_taken(monkeypatch):
    spec = WeightSpec.mlp([2, 5, 1])
    a = random_weights(spec, (3,))
    monkeypatch.setattr(_sweeps, "match", lambda problem: pytest.fail("a small network on a CPU is compiled"))
    weight_matching(spec, a, a)
    monkeypatch.undo()
    monkeypatch.setattr(_compiled, "match", lambda problem: pytest.fail("so many products are PyTorch's"))
    monkeypatch.setattr(_compiled, "_MOST", 99)
    weight_matching(spec, a, a)


@pytest.mark.parametrize("restarts", [1, 2, 4])
@pytest.mark.parametrize("symmetries", [KINDS[:1], KINDS[:2], ("sign", "phase"), KINDS])
@pytest.mark.parametrize("name", ALL)
def test_both_ways_find_the_same(batched, name, symmetries, restarts):
    spec = ALL[name]
    a, b = ({n: 0.3 * w for n, w in random_weights(spec, (9,), seed, DOUBLE).items()} for seed in (0, 1))
    expected, slow = batched(spec, a, b, symmetries=symmetries, restarts=restarts, seed=3)
    found, fast = weight_matching(spec, a, b, symmetries=symmetries, restarts=restarts, seed=3)
    assert slow.element.keys() == fast.element.keys()
    for key, value in slow.element.items():
        assert torch.equal(fast.element[key], value), key
        assert fast.element[key].dtype == value.dtype
    for tensor in expected:
        assert torch.equal(found[tensor], expected[tensor])
    assert torch.equal(fast.sweeps, slow.sweeps)
    for report in ("objective", "distance_before", "distance_after"):
        torch.testing.assert_close(getattr(fast, report), getattr(slow, report), rtol=1e-12, atol=1e-12)


def test_both_ways_find_the_same_in_float32(batched):
    """Up to rounding: in a few of many pairs a close call may go the other way."""
    spec = WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0)
    a, b = ({n: 0.3 * w for n, w in random_weights(spec, (60,), seed).items()} for seed in (0, 1))
    _, slow = batched(spec, a, b, symmetries=KINDS)
    _, fast = weight_matching(spec, a, b, symmetries=KINDS)
    same = torch.stack([(fast.element[key] == slow.element[key]).all(-1) for key in slow.element]).all(0)
    assert same.sum() >= 58
    torch.testing.assert_close(fast.distance_after.mean(), slow.distance_after.mean(), rtol=1e-3, atol=0)


def test_a_small_cnn_with_a_residual_stream_and_broadcast_reference(batched):
    spec = convolutional_spec()
    a, b = random_weights(spec, (), 0, DOUBLE), random_weights(spec, (7,), 1, DOUBLE)
    expected, _ = batched(spec, a, b, restarts=3)
    found, _ = weight_matching(spec, a, b, restarts=3)
    for tensor in expected:
        assert torch.equal(found[tensor], expected[tensor])


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(_threads.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(_threads.os, "cpu_count", lambda: 2)


def aligned_flat(spec, pairs=40):
    a, b = random_weights(spec, (pairs,), 0), random_weights(spec, (pairs,), 1)
    return spec.flatten(weight_matching(spec, a, b)[0])


def test_threads_change_nothing(two_threads, monkeypatch):
    spec = WeightSpec.mlp([2, 16, 16, 1], activation="tanh")
    several = aligned_flat(spec)
    monkeypatch.setattr(_threads.torch, "get_num_threads", lambda: 1)
    assert torch.equal(aligned_flat(spec), several)


def test_many_pairs_go_in_parts(monkeypatch):
    spec = WeightSpec.mlp([2, 6, 6, 1], activation="tanh")
    whole = aligned_flat(spec)
    monkeypatch.setattr(_compiled, "_PER_CALL", 7)
    assert torch.equal(aligned_flat(spec), whole)


def _in_child(spec, sender):
    sender.send(aligned_flat(spec).numpy())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(two_threads):
    """As the workers of a DataLoader are: those of the parent do not run in the child."""
    spec = WeightSpec.mlp([2, 8, 8, 1], activation="tanh")
    expected = aligned_flat(spec)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(spec, sender), daemon=True)
    child.start()
    assert receiver.poll(60), "the child waits for threads that it does not have"
    assert torch.equal(torch.from_numpy(receiver.recv()), expected)
    child.join(60)
    assert child.exitcode == 0


def test_an_error_on_a_thread_reaches_the_caller(two_threads):
    counter = torch.zeros(1, dtype=torch.long).numpy()

    def kernel():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        _threads.share(4, kernel, counter=counter)
    assert counter[0] > 4, "no thread begins another job"


def test_numba_is_loaded_when_it_is_needed():
    code = "import weightspace.align, sys; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
