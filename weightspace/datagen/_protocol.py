"""How an INR is initialised, trained and stopped: metadata that a reader of its weights needs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from weightspace.nets import MLP


class Protocol(BaseModel):
    """A training protocol; ``preset`` names the published one that it started from.

    Example:
        >>> Protocol.model_validate("dws").output_offset
        0.5
        >>> Protocol.model_validate({"preset": "dws", "steps": 200}).steps
        200
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str | None = Field(None, description="name of the preset that the other fields started from")
    first_layer: Literal["siren", "hidden"] = Field(
        "hidden", description="bound of the first layer: siren 1/fan_in, hidden sqrt(6/fan_in)/w0"
    )
    bias: Literal["zero", "uniform"] = Field("zero", description="initial biases; uniform +-1/sqrt(fan_in)")
    output_offset: float = Field(0.0, description="constant added to the output")
    learning_rate: float = Field(5e-4, gt=0, description="of Adam")
    steps: int = Field(1000, ge=1, description="Adam updates on all samples, at most")
    target_psnr: float | None = Field(40.0, description="stop at this PSNR in dB; null for never")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if isinstance(value, dict) and value.get("preset") is not None:
            preset = PROTOCOLS.get(str(value["preset"]))
            if preset is None:
                raise ValueError(f"expected a preset of {', '.join(PROTOCOLS)}, found {value['preset']!r}")
            return {**preset, **value}
        return value

    def initial_bounds(self, net: MLP) -> np.ndarray:
        """Half-width of the uniform distribution of each parameter, (P,) float32, in state_dict order.

        Hidden layers follow Sitzmann et al. 2020 (arXiv:2006.09661), section 3.2: sqrt(6 / fan_in) / w0.
        """
        bounds = []
        for index, (fan_in, fan_out) in enumerate(pairwise(net.widths)):
            hidden = math.sqrt(6.0 / fan_in) / net.w0
            weight = 1.0 / fan_in if index == 0 and self.first_layer == "siren" else hidden
            bias = 1.0 / math.sqrt(fan_in) if self.bias == "uniform" else 0.0
            bounds += [np.full(fan_in * fan_out, weight), np.full(fan_out, bias)]
        return np.concatenate(bounds).astype(np.float32)


PROTOCOLS: dict[str, dict[str, Any]] = {
    # Navon et al. 2023 (arXiv:2301.12780): the field's MNIST and Fashion-MNIST INRs
    "dws": {"first_layer": "hidden", "bias": "zero", "output_offset": 0.5},
    # Sitzmann et al. 2020: the first layer spans many periods of the sine
    "siren": {"first_layer": "siren", "bias": "zero", "output_offset": 0.0},
}
"""The presets. Both train with Adam 5e-4 on all samples for 1000 steps or until 40 dB."""
