"""Metanetworks: networks whose input is other networks' weights."""

from weightspace.models._baselines import FlatMLP, StatisticsMLP, StatisticsTrees, statistics
from weightspace.models._configs import (
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
from weightspace.models._probe import Probe
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

__all__ = [
    "DWS",
    "MODELS",
    "NFN",
    "UNF",
    "DWSConfig",
    "Encoding",
    "EquivariantHead",
    "EquivariantLinear",
    "EquivariantNetwork",
    "EquivariantStack",
    "FittedOnce",
    "FlatMLP",
    "FlatMLPConfig",
    "InvariantHead",
    "InvariantPool",
    "ModelConfig",
    "NFNConfig",
    "OrbitNorm",
    "Orbits",
    "Probe",
    "ProbeConfig",
    "SetAttention",
    "StatisticsConfig",
    "StatisticsMLP",
    "StatisticsTrees",
    "UNFConfig",
    "free_ends",
    "model_config",
    "statistics",
]
