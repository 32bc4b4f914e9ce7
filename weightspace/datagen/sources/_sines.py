"""Sums of sines, whose frequencies and amplitudes are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field, PositiveFloat, model_validator

from weightspace.datagen._distributions import Distribution
from weightspace.datagen.sources._source import SOURCES, Signals, SourceConfig


@SOURCES.register("sines")
class Sines(SourceConfig):
    """Sums of sines on a line, made from a seed; frequencies, amplitudes and phases are labels.

    On ``samples`` points x in [-1, 1], ends included,

        y(x) = sum_k amplitude_k sin(pi frequency_k x + phase_k),

    components in order of their frequency. One component of amplitude 1 and frequency U(0.5, 10) is the
    regression task of Navon et al. 2023 (arXiv:2301.12780), whose x in [-pi, pi] is our pi x.
    """

    count: int = Field(1000, ge=1, description="signals")
    samples: int = Field(256, ge=2, le=2**20, description="points per signal")
    components: int = Field(1, ge=1, le=64, description="sines per signal")
    frequency: Distribution[PositiveFloat] = Field(
        Distribution("uniform", (0.5, 10.0)), description="periods over the line, of each component"
    )
    amplitude: Distribution[PositiveFloat] = Field(
        Distribution.constant(1.0), description="of each component"
    )
    phase: Distribution[float] = Field(
        Distribution.constant(0.0), description="of each component, in radians"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the frequencies, amplitudes and phases")

    @model_validator(mode="after")
    def _told_apart(self) -> Sines:
        most = (self.samples - 1) / 2
        if self.frequency.high >= most:
            raise ValueError(
                f"frequency: expected less than {most:g} periods for {self.samples} samples, found "
                f"{self.frequency.high:g}"
            )
        return self

    def load(self, data_root: Path | None) -> Signals:
        """Draw and sample the signals; signal i does not depend on how many there are.

        The label is the frequency of the strongest component; attributes are ``frequency_k``, ``amplitude_k`` and
        ``phase_k`` for k = 1, 2, ...
        """
        frequency, amplitude, phase = (self._drawn(name) for name in ("frequency", "amplitude", "phase"))
        order = np.argsort(frequency, axis=0, kind="stable")
        frequency, amplitude, phase = (
            np.take_along_axis(values, order, axis=0) for values in (frequency, amplitude, phase)
        )
        x = np.pi * np.linspace(-1.0, 1.0, self.samples)
        items = np.zeros((self.count, self.samples))
        for component in range(
            self.components
        ):  # one at a time: all at once would take as many times the memory
            angle = frequency[component, :, None] * x + phase[component, :, None]
            items += amplitude[component, :, None] * np.sin(angle)
        strongest = amplitude.argmax(axis=0)
        named = {"frequency": frequency, "amplitude": amplitude, "phase": phase}
        return Signals(
            items=items.astype(np.float32),
            labels=frequency[strongest, np.arange(self.count)].astype(np.float32),
            attributes={
                f"{name}_{component + 1}": values[component].astype(np.float32)
                for component in range(self.components)
                for name, values in named.items()
            },
        )

    def _drawn(self, name: str) -> np.ndarray:
        """(components, count), a stream of its own for each component."""
        distribution: Distribution[float] = getattr(self, name)
        return np.stack(
            [
                distribution.sample(f"sines.{name}_{component + 1}", self.seed, self.count)
                for component in range(self.components)
            ]
        )
