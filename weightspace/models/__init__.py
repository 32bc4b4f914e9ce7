"""Metanetworks: networks whose input is other networks' weights."""

from weightspace.models._baselines import DeepSets, FlatMLP, StatisticsMLP, StatisticsTrees, statistics
from weightspace.models._configs import (
    DeepSetsConfig,
    DWSConfig,
    FlatMLPConfig,
    NFNConfig,
    ProbeConfig,
    StatisticsConfig,
    UNFConfig,
)
from weightspace.models._dws import DWS, NFN, UNF
from weightspace.models._encoding import Encoding
from weightspace.models._ends import free_ends
from weightspace.models._equivariant import EquivariantLinear
from weightspace.models._orbits import Orbits
from weightspace.models._probe import FreeProbes, GeneratedProbes, Probe, ProbeFeatures
from weightspace.models._registry import MODELS, FittedOnce, ModelConfig, model_config
from weightspace.models._stack import (
    EquivariantHead,
    EquivariantNetwork,
    EquivariantStack,
    InvariantHead,
    InvariantPool,
    OrbitNorm,
    SetAttention,
)
from weightspace.models._unit_activations import unit_activations
from weightspace.models.graph import (
    GraphConfig,
    GraphLayer,
    GraphNetwork,
    GraphOptions,
    GraphPlan,
    ProbedGraphNetwork,
    from_graph,
    graph_plan,
    join,
    to_graph,
)

__all__ = [
    "DWS",
    "MODELS",
    "NFN",
    "UNF",
    "DWSConfig",
    "DeepSets",
    "DeepSetsConfig",
    "Encoding",
    "EquivariantHead",
    "EquivariantLinear",
    "EquivariantNetwork",
    "EquivariantStack",
    "FittedOnce",
    "FlatMLP",
    "FlatMLPConfig",
    "FreeProbes",
    "GeneratedProbes",
    "GraphConfig",
    "GraphLayer",
    "GraphNetwork",
    "GraphOptions",
    "GraphPlan",
    "InvariantHead",
    "InvariantPool",
    "ModelConfig",
    "NFNConfig",
    "OrbitNorm",
    "Orbits",
    "Probe",
    "ProbeConfig",
    "ProbeFeatures",
    "ProbedGraphNetwork",
    "SetAttention",
    "StatisticsConfig",
    "StatisticsMLP",
    "StatisticsTrees",
    "UNFConfig",
    "free_ends",
    "from_graph",
    "graph_plan",
    "join",
    "model_config",
    "statistics",
    "to_graph",
    "unit_activations",
]
