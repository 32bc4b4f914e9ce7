"""Graph networks whose nodes also hold what the units of the networks answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from weightspace.models._probe import ProbeFeatures, by_channel
from weightspace.models.graph._network import GraphNetwork
from weightspace.models.graph._options import GraphOptions
from weightspace.spec import Weights, WeightSpec


class ProbedGraphNetwork(nn.Module):
    """A graph network that also sees the networks at work: nodes hold the activations of their units.

    All networks are run on the same learned inputs. A hidden unit's node gets what it answers to them, an input
    unit's what it was given, an output unit's what came out; the head also reads what came out by itself. Units
    whose activations cannot be read, such as those within attention heads, get zeros.

    Args:
        network: a network of the population's architecture; supplies the computation only, and in eval mode.
        spec: its weight space.
        out_features: size of the output; None for weights.
        probes: number of learned inputs.
        generator: ``"none"`` or ``"linear"``, see :class:`~weightspace.models.Probe`.
        answer_features: that the head gets of the answers of the networks as a whole.
        input_shape: of one input; None where the network shows it.
        options: of the graphs; the width of further node features is the number of probes.
        chosen: further options of :class:`GraphNetwork`.

    Shapes:
        Weights with one batch axis, as the graph is to hold them, and the same weights as the networks use them
        -> (batch, out_features), or weights of the same shapes.

    Raises:
        ConfigError: an option out of range.
        SpecError: a spec that the layout cannot hold.

    Reference:
        Kofinas et al. 2024, "Graph Neural Networks for Learning Equivariant Representations of Neural Networks",
        arXiv:2403.12143, section 3.2.

    Example:
        >>> import torch
        >>> from weightspace.nets import MLP
        >>> spec = WeightSpec.mlp([2, 8, 1], activation="sine", w0=30.0)
        >>> model = ProbedGraphNetwork(MLP((2, 8, 1)), spec, 10, probes=16, hidden=8)
        >>> weights = spec.unflatten(torch.randn(4, spec.num_parameters))
        >>> model(weights, raw=weights).shape
        torch.Size([4, 10])
    """

    takes_raw: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        spec: WeightSpec,
        out_features: int | None = None,
        *,
        probes: int = 64,
        generator: str = "linear",
        answer_features: int = 128,
        input_shape: Sequence[int] | None = None,
        options: GraphOptions | None = None,
        **chosen: Any,
    ) -> None:
        super().__init__()
        self.probe = ProbeFeatures(
            network,
            spec,
            probes=probes,
            generator=generator,
            input_shape=input_shape,
            partial=True,
        )
        options = (options or GraphOptions(types="tensor")).model_copy(update={"input_features": probes})
        self.answers: nn.Module | None = None
        if out_features is not None:
            size = self.probe.answers
            linear = nn.Linear(size, answer_features)
            self.answers = nn.Sequential(nn.BatchNorm1d(size), linear, nn.ReLU())
            chosen["context_features"] = answer_features
        self.graph = GraphNetwork(spec, out_features, options=options, **chosen)

    def forward(self, weights: Weights, raw: Weights) -> Tensor | Weights:
        """Read a batch of networks: their weights as features, and as they run."""
        units, answers = self.probe.with_answers(raw)
        assert self.graph.plan is not None
        given = by_channel(self.probe.probes, 1)
        ends = {"input": given.expand(len(answers), -1, -1), "output": by_channel(answers, 2)}
        for nodes in self.graph.plan.nodes:
            end = ends.get(nodes.role)
            if end is not None and nodes.count == end.shape[1]:
                units[nodes.name] = end
        context = None if self.answers is None else self.answers(answers.flatten(1))
        out: Tensor | Weights = self.graph(weights, node_inputs=units, context=context)
        return out
