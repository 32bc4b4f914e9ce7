"""The options of every metanetwork, as the command and RUN/config.yaml show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from torch import nn

from weightspace.models._baselines import DeepSets, FlatMLP, StatisticsMLP, StatisticsTrees
from weightspace.models._dws import DWS, NFN, UNF
from weightspace.models._probe import Probe
from weightspace.models._registry import MODELS, ModelConfig
from weightspace.spec import WeightSpec


def _checked_sizes(value: Any) -> Any:
    """One sentence for a number or several, where a union of types would give one per type."""
    sizes = value if isinstance(value, list | tuple) else [value]
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise PydanticCustomError("sizes", "input should be an integer of at least 1, or several")
    return value


Size = Annotated[int, Field(ge=1)]
Sizes = Annotated[int | tuple[int, ...], BeforeValidator(_checked_sizes)]
Pooling = Literal["mean", "max", "sum"]
HeadPooling = Literal["mean", "max", "sum", "attention"]
Mixing = Literal["full", "shared", "none"]
Wide = Literal["refuse", "encode", "project"]
MIXING = "how tensors meet: by a matrix of each pair, through small vectors, or not without a shared group"
WIDE = "what becomes of more than 16 fixed indices, such as input pixels"


@MODELS.register("dws", paper="Navon et al. 2023, arXiv:2301.12780")
class DWSConfig(ModelConfig):
    """Deep weight-space network: equivariant layers and an invariant head."""

    training: ClassVar[Mapping[str, Any]] = {
        "epochs": 20,
        "learning_rate": 3e-3,
        "augment": "sign, noise(0.05)",
    }

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"layers": 5, "attention": 8, "pooling": ("max",), "head": 0}
    }

    hidden: int = Field(32, ge=1, description="channels per weight entry")
    layers: int = Field(4, ge=1, description="equivariant layers")
    pooling: tuple[Pooling, ...] = Field(("mean", "max"), min_length=1, description="how groups are pooled")
    norm: Literal["batch", "none"] = Field("batch", description="after each layer")
    attention: int = Field(0, ge=0, description="heads of self-attention among units; 0 for none")
    dropout: float = Field(0.0, ge=0, lt=1, description="after each layer")
    head: int = Field(128, ge=0, description="hidden units of the head; 0 for a linear one")
    global_mixing: Mixing = Field("full", description=MIXING)
    wide: Wide = Field("refuse", description=WIDE)

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """A DWS for the spec."""
        return DWS(spec, out_features, **self.model_dump())


@MODELS.register("nfn", paper="Zhou et al. 2023, arXiv:2302.14040")
class NFNConfig(ModelConfig):
    """Permutation equivariant neural functional: mean pooling, with input and output units fixed or permutable."""

    training: ClassVar[Mapping[str, Any]] = {
        "epochs": 20,
        "learning_rate": 1e-3,
        "augment": "sign, noise(0.05)",
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "hidden": 512,
            "layers": 3,
            "fourier": 128,
            "scale": 3.0,
            "raw": False,
            "head": (1000, 1000),
            "dropout": 0.1,
        }
    }

    variant: Literal["hnp", "np"] = Field(
        "hnp",
        description="hnp: input and output units are fixed; np: permutable, told apart by learned vectors",
    )
    hidden: int = Field(64, ge=1, description="channels per weight entry")
    layers: int = Field(3, ge=1, description="equivariant layers")
    fourier: int = Field(0, ge=0, description="random frequencies in which each weight is encoded")
    scale: float = Field(1.0, gt=0, description="standard deviation of the frequencies")
    raw: bool = Field(True, description="whether the weight itself stays beside its frequencies")
    dropout: float = Field(0.0, ge=0, lt=1, description="of whole channels after each layer")
    head: Sizes = Field(512, description="hidden units of the head; several for several layers")
    head_pooling: tuple[HeadPooling, ...] = Field(("mean",), min_length=1, description="in the head")
    global_mixing: Mixing = Field("full", description=MIXING)
    wide: Wide = Field("refuse", description=WIDE)

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """An NFN for the spec."""
        return NFN(spec, out_features, **self.model_dump())


@MODELS.register("unf", paper="Zhou et al. 2024, arXiv:2402.05232")
class UNFConfig(ModelConfig):
    """Universal neural functional: any architecture, at a cost that grows linearly with its depth."""

    training: ClassVar[Mapping[str, Any]] = DWSConfig.training
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"norm": "none", "global_mixing": "full", "head_pooling": ("mean",)}
    }

    hidden: int = Field(32, ge=1, description="channels per weight entry")
    layers: int = Field(3, ge=1, description="equivariant layers")
    pooling: tuple[Pooling, ...] = Field(("mean",), min_length=1, description="how groups are pooled")
    norm: Literal["batch", "none"] = Field("batch", description="after each layer")
    dropout: float = Field(0.0, ge=0, lt=1, description="after each layer")
    head: int = Field(128, ge=0, description="hidden units of the head; 0 for a linear one")
    head_pooling: tuple[HeadPooling, ...] = Field(("mean", "max"), min_length=1, description="in the head")
    global_mixing: Mixing = Field("shared", description=MIXING)
    wide: Wide = Field("encode", description=WIDE)

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """A UNF for the spec."""
        return UNF(spec, out_features, **self.model_dump())


@MODELS.register("mlp", paper="baseline in Navon et al. 2023, arXiv:2301.12780")
class FlatMLPConfig(ModelConfig):
    """MLP on the flattened weights."""

    training: ClassVar[Mapping[str, Any]] = {"epochs": 30, "learning_rate": 1e-3}

    hidden: tuple[Size, ...] = Field((512, 512), min_length=1, description="units per hidden layer")
    dropout: float = Field(0.2, ge=0, lt=1, description="after each hidden layer")
    align: bool = Field(False, description="first align every network to one of the training split")

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """A flat MLP for the spec."""
        return FlatMLP(spec, self.numbers(out_features), **self.model_dump())


@MODELS.register("deepsets", paper="Zaheer et al. 2017, arXiv:1703.06114")
class DeepSetsConfig(ModelConfig):
    """The weights as a set of numbers, each marked with its tensor."""

    training: ClassVar[Mapping[str, Any]] = {"epochs": 30, "learning_rate": 1e-3}

    features: int = Field(64, ge=1, description="of each weight")
    layers: int = Field(2, ge=1, description="of the MLP that each weight goes through")
    hidden: tuple[Size, ...] = Field((128,), min_length=1, description="units per hidden layer of the head")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the head")

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """DeepSets for the spec."""
        return DeepSets(spec, self.numbers(out_features), **self.model_dump())


@MODELS.register("statistics", paper="Unterthiner et al. 2020, arXiv:2002.11448")
class StatisticsConfig(ModelConfig):
    """Mean, variance and quantiles of each tensor, read by gradient-boosted trees or an MLP."""

    training: ClassVar[Mapping[str, Any]] = {"epochs": 30, "learning_rate": 1e-3}

    reader: Literal["trees", "mlp"] = Field("trees", description="what reads the statistics")
    iterations: int = Field(100, ge=1, description="boosting rounds of the trees")
    tree_learning_rate: float = Field(0.1, gt=0, description="of boosting")
    hidden: tuple[Size, ...] = Field(
        (256, 256), min_length=1, description="units per hidden layer of the MLP"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of the MLP")

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """The chosen reader."""
        if self.reader == "mlp":
            return StatisticsMLP(spec, self.numbers(out_features), hidden=self.hidden, dropout=self.dropout)
        return StatisticsTrees(
            spec,
            self.numbers(out_features),
            iterations=self.iterations,
            learning_rate=self.tree_learning_rate,
        )


@MODELS.register("probe", paper="Kahana et al. 2024, arXiv:2410.10811")
class ProbeConfig(ModelConfig):
    """Learned inputs sent through the networks; an MLP reads the outputs."""

    reads: ClassVar[str] = "raw"
    training: ClassVar[Mapping[str, Any]] = {"epochs": 30, "learning_rate": 3e-3}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "probes": 128,
            "generator": "linear",
            "bound": True,
            "norm": "none",
            "hidden": (256,) * 5,
            "dropout": 0.0,
        }
    }

    probes: int = Field(64, ge=1, description="learned inputs")
    generator: Literal["none", "linear"] = Field(
        "none", description="none: the inputs are parameters; linear: made from latent codes (ProbeGen)"
    )
    latent: int = Field(32, ge=1, description="size of a latent code")
    generator_layers: int | None = Field(
        None, ge=1, description="of the generator; 2 for coordinates and 5 for images by default"
    )
    generator_width: int = Field(
        16, ge=1, description="channels before the last layer of a generator of images"
    )
    bound: bool = Field(False, description="generated images go through tanh")
    input_shape: tuple[int, ...] | None = Field(
        None, description="of one input, such as [3, 32, 32]; known for MLPs"
    )
    norm: Literal["batch", "none"] = Field("batch", description="of the outputs, and after each hidden layer")
    hidden: tuple[Size, ...] = Field((256, 256), min_length=1, description="units per hidden layer")
    dropout: float = Field(0.2, ge=0, lt=1, description="after each hidden layer")

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """Probes for networks that can be rebuilt.

        Raises:
            ConfigError: the zoo does not say how to rebuild its networks, or they do not show what they read.
        """
        return Probe(self.network(architecture), self.numbers(out_features), **self.model_dump())

    def settled(self, *specs: WeightSpec) -> ProbeConfig:
        """These options: nothing but the function of a network is seen."""
        return self
