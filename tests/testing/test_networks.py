"""The networks that spec tracing is tried on: reproducible, exportable at two sizes, using all they embed."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightspace.testing import Case, networks
from weightspace.testing._networks._case import case as register
from weightspace.testing._networks._case import floats

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
CASES = networks("core", "transformers") if HAS_TRANSFORMERS else networks("core")
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

# Rows that no input can reach: OPT's table starts two places early, and T5's bucket for "later by zero places".
UNREACHABLE = {
    ("hf_opt", "model.decoder.embed_positions"): {0, 1},
    ("hf_t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"): {3},
}


def arguments(case: Case, which: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = getattr(case, which)()
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Twice(nn.Module):
    """A network called at both sizes: one export for two, as most of its time does not depend on the graph."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
        return [self.module(*args, **kwargs) for args, kwargs in calls]


@EVERY_CASE
def test_an_exported_network_computes_the_same(case: Case) -> None:
    module = Twice(case.build())
    calls = (arguments(case, "inputs"), arguments(case, "more_inputs"))
    program = torch.export.export(module, calls, strict=False).run_decompositions({})
    # With gradients the fused attention may pick another kernel, whose strides the exported views reject.
    with torch.no_grad():
        expected, found = module(*calls), program.module()(*calls)
    torch.testing.assert_close(tensors(found), tensors(expected), rtol=1e-4, atol=1e-5)


@EVERY_CASE
def test_a_network_is_the_same_each_time_and_leaves_the_generator_alone(case: Case) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = case.build(), case.build()
    for which in ("inputs", "more_inputs"):
        for one, other in zip(tensors(getattr(case, which)()), tensors(getattr(case, which)()), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(torch.rand(3), expected)
    assert not any(module.training for module in first.modules())
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@EVERY_CASE
def test_the_two_inputs_differ_in_size_and_no_size_is_one(case: Case) -> None:
    shapes, more = (
        [tuple(tensor.shape) for tensor in tensors(getattr(case, which)())]
        for which in ("inputs", "more_inputs")
    )
    assert len(shapes) == len(more)
    assert all(one != other for one, other in zip(shapes, more, strict=True))
    assert all(size >= 2 for shape in shapes + more for size in shape)


@EVERY_CASE
def test_the_outputs_that_count_exist(case: Case) -> None:
    args, kwargs = arguments(case, "inputs")
    with torch.no_grad():
        found = case.build()(*args, **kwargs)
    for name in case.outputs or ():
        value = found[int(name)] if name.isdecimal() else found[name]
        assert isinstance(value, Tensor)
        assert value.std() > 0


@EVERY_CASE
def test_inputs_reach_every_row_of_every_embedding(case: Case) -> None:
    module = case.build()
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Embedding)]
    # Layers that share their table count together.
    reached: dict[nn.Parameter, set[int]] = {layer.weight: set() for _, layer in layers}
    for _, layer in layers:
        layer.register_forward_hook(lambda layer, _, out: reached[layer.weight].update(rows_of(layer, out)))
    args, kwargs = arguments(case, "inputs")
    with torch.no_grad():
        module(*args, **kwargs)
    for name, layer in layers:
        missing = set(range(layer.num_embeddings)) - reached[layer.weight]
        assert missing == UNREACHABLE.get((case.name, name), set()), name


def rows_of(layer: nn.Embedding, out: Tensor) -> set[int]:
    """The rows of the table that occur in its output: some subclasses shift the ids that they are given."""
    rows = out.reshape(-1, layer.embedding_dim)
    return set((rows[:, None] == layer.weight).all(-1).nonzero()[:, 1].tolist())


def test_every_family_is_told_apart() -> None:
    assert {case.family for case in networks().values()} == {"core"}
    assert {case.family for case in networks("core", "large").values()} == {"core", "large"}
    assert list(networks("large")) == ["resnet50"]
    assert all(case.name == name and case.note for name, case in CASES.items())


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="expected some of core, large, transformers, found 'vision'"):
        networks("vision")


def test_a_name_is_taken_once() -> None:
    def mlp() -> nn.Module:
        """Again."""
        return nn.Identity()

    networks()
    with pytest.raises(ValueError, match="case 'mlp' is registered twice"):
        register(floats((2, 3)), floats((3, 3)))(mlp)


def test_the_large_resnet_has_as_many_parameters_as_the_paper_network() -> None:
    with torch.device("meta"):
        module = networks("large")["resnet50"].build()
    # What torchvision's resnet50 has.
    assert sum(parameter.numel() for parameter in module.parameters()) == 25_557_032


def test_plain_networks_do_not_need_transformers() -> None:
    code = """
import sys
sys.modules["transformers"] = None
from weightspace.testing import networks
print(len(networks("core", "large")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30
