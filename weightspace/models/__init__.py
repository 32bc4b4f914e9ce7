"""Metanetworks: networks whose input is other networks' weights."""

from weightspace.models._baselines import FlatMLP, StatisticsMLP, StatisticsTrees, statistics
from weightspace.models._configs import DWSConfig, FlatMLPConfig, ProbeConfig, StatisticsConfig
from weightspace.models._dws import DWS, InvariantPool, OrbitNorm
from weightspace.models._equivariant import EquivariantLinear
from weightspace.models._orbits import Orbits
from weightspace.models._probe import Probe
from weightspace.models._registry import MODELS, FittedOnce, ModelConfig, model_config

__all__ = [
    "DWS",
    "MODELS",
    "DWSConfig",
    "EquivariantLinear",
    "FittedOnce",
    "FlatMLP",
    "FlatMLPConfig",
    "InvariantPool",
    "ModelConfig",
    "OrbitNorm",
    "Orbits",
    "Probe",
    "ProbeConfig",
    "StatisticsConfig",
    "StatisticsMLP",
    "StatisticsTrees",
    "model_config",
    "statistics",
]
