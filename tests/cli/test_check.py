"""``weightspace check``: what it finds before anything is done, and that it does nothing."""

import json

import pytest
import torch

from weightspace.nets import MLP, architecture_of
from weightspace.zoo import save_network


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    for name in ("a", "b", "base"):
        net = MLP((3, 5, 2), activation="relu")
        save_network(tmp_path / f"{name}.safetensors", net.state_dict(), architecture_of(net))
    return tmp_path


def checked(call, *arguments):
    code, out, err = call("check", *arguments, "--json")
    assert err == ""
    assert out.count("\n") == 1
    return code, json.loads(out)


def test_networks_that_fit(call, folder):
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    output = folder / "out.safetensors"
    before = sorted(folder.iterdir())
    code, found = checked(call, *files, "--base", folder / "base.safetensors", "-o", output)
    assert (code, found["fits"], found["differences"]) == (0, True, [])
    assert [network["elements"] for network in found["networks"]] == [32, 32, 32]
    assert found["spec"]["groups"] == {"hidden0": 5}
    assert found["memory"] == {
        "largest_tensor": "layers.0.weight",
        "largest_bytes": 60,
        "streamed_bytes": 240,
        "whole_bytes": 3 * 128,
    }
    assert found["output"]["path"] == str(output)
    assert (found["output"]["bytes"], found["output"]["error"]) == (128, None)
    assert found["output"]["free_bytes"] > 128
    code, out, _ = call("check", *files, "-o", output)
    assert code == 0
    assert "a.safetensors: 4 tensors, 32 elements of float32, 128 bytes\n" in out
    assert "spec: 1 groups of 5 units, symmetries permutation, positive" in out
    assert "memory: 180 bytes to merge tensor by tensor (the largest, 'layers.0.weight', is 60 bytes)" in out
    assert out.endswith("they fit\n")
    assert sorted(folder.iterdir()) == before


def test_everything_that_does_not_fit_is_listed(call, folder):
    state = {name: tensor.clone() for name, tensor in MLP((3, 5, 2)).state_dict().items()}
    state["layers.0.weight"] = state["layers.0.weight"].T.contiguous()
    state["layers.0.bias"][0] = torch.nan
    state["layers.1.weight"] = torch.zeros(2, 6)
    del state["layers.1.bias"]
    state["more"] = torch.zeros(1)
    save_network(folder / "c.safetensors", state)
    a, c = folder / "a.safetensors", folder / "c.safetensors"
    code, found = checked(call, a, c)
    assert (code, found["fits"]) == (2, False)
    kinds = {(d["kind"], d["tensor"]) for d in found["differences"]}
    assert kinds == {
        ("transposed", "layers.0.weight"),
        ("shape", "layers.1.weight"),
        ("missing", "layers.1.bias"),
        ("unexpected", "more"),
        ("not finite", "layers.0.bias"),
    }
    first = found["differences"][0]["text"]
    assert first == f"'layers.0.weight' is [5, 3] in {a} and [3, 5] in {c}: transposed"
    code, out, _ = call("check", a, c)
    assert code == 2
    assert out.endswith("they do not fit\n")
    assert ("not finite", "layers.0.bias") not in {
        (d["kind"], d["tensor"]) for d in checked(call, a, c, "--no-values")[1]["differences"]
    }


def test_names_with_a_prefix_and_other_orders_of_axes_are_recognised(call, tmp_path):
    state = {"conv.weight": torch.randn(4, 3, 5, 5), "conv.bias": torch.randn(4)}
    save_network(tmp_path / "a.safetensors", state)
    save_network(tmp_path / "b.safetensors", {f"module.{name}": t for name, t in state.items()})
    last = state["conv.weight"].permute(2, 3, 1, 0)
    save_network(tmp_path / "c.safetensors", {**state, "conv.weight": last})
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    _, found = checked(call, a, b)
    assert found["differences"][0]["text"].endswith(f"is missing; the names of {b} all begin with 'module.'")
    _, found = checked(call, a, c)
    assert found["differences"][0]["text"].endswith("its axes are in another order")


def test_types_may_differ_and_tied_tensors_are_told(call, tmp_path):
    shared = torch.randn(6, 2)
    torch.save({"in.weight": shared, "out.weight": shared}, tmp_path / "a.pt")
    torch.save({"in.weight": shared.half(), "out.weight": shared.half()}, tmp_path / "b.pt")
    code, found = checked(call, tmp_path / "a.pt", tmp_path / "b.pt")
    assert code == 0
    assert found["networks"][0]["tied"] == [["in.weight", "out.weight"]]
    assert found["spec"] is None
    assert {d["kind"] for d in found["differences"]} == {"type"}
    code, out, _ = call("check", tmp_path / "a.pt", tmp_path / "b.pt")
    assert "in.weight = out.weight tied" in out
    assert "'in.weight' is of type float32 in" in out
    assert "architecture unknown: they can be merged" in out


def test_eight_bits_are_refused_as_align_and_merge_refuse_them(call, tmp_path):
    state = {"w": torch.ones(3, 2)}
    save_network(tmp_path / "a.safetensors", {"w": state["w"].to(torch.float8_e4m3fn)})
    save_network(tmp_path / "b.safetensors", state)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-o", tmp_path / "c.safetensors"]
    code, found = checked(call, *files)
    assert (code, [d["kind"] for d in found["differences"]]) == (2, ["narrow", "type"])
    assert "at least 16 bits, found float8_e4m3fn" in found["differences"][0]["text"]
    assert found["output"]["bytes"] == 24


def test_outputs_that_cannot_be_and_files_that_are_none(call, refuse, folder):
    a, b = folder / "a.safetensors", folder / "b.safetensors"
    code, found = checked(call, a, b, "-o", b)
    assert code == 2
    assert f"is the input {b}" in found["output"]["error"]
    code, found = checked(call, a, b, "-o", folder / "base.safetensors")
    assert (code, "exists already" in found["output"]["error"]) == (2, True)
    assert checked(call, a, b, "-o", folder / "base.safetensors", "--overwrite")[0] == 0
    assert "no.pt: file not found" in refuse("check", a, folder / "no.pt")
    (folder / "noise.safetensors").write_bytes(b"noise")
    assert "noise.safetensors: not a readable safetensors file" in refuse(
        "check", folder / "noise.safetensors"
    )
