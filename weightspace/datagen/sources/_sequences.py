"""Arithmetic questions as sequences of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from weightspace.datagen.sources._source import SOURCES, Signals, SourceConfig

_OPERATORS = {"sum": "+", "difference": "-", "product": "*"}


@SOURCES.register("sequences")
class Sequences(SourceConfig):
    """Arithmetic questions, made from a seed: ``07+42=`` as tokens, the answer modulo ``modulus`` as class.

    A task for recurrent networks after the Tiny-RNN zoo of Zhou et al. 2024 (arXiv:2402.05232); there the answer is
    spelt out, here it is a class (and, whole, the attribute ``answer``). Digits are the tokens 0 to 9, the operator
    is 10, the equals sign 11. No question is asked twice.
    """

    count: int = Field(10_000, ge=1, description="questions")
    operation: Literal["sum", "difference", "product"] = Field("sum", description="of the numbers")
    terms: int = Field(2, ge=1, le=18, description="numbers in a question")
    digits: int = Field(2, ge=1, le=18, description="of each number, with leading zeros")
    modulus: int = Field(10, ge=2, le=10_000, description="number of classes")
    seed: int = Field(0, ge=0, lt=2**63, description="of the choice of questions")

    @model_validator(mode="after")
    def _enough_questions(self) -> Sequences:
        digits = self.terms * self.digits
        if digits > 18:  # int64 holds every answer
            raise ValueError(f"digits: expected at most 18 in a question (terms * digits), found {digits}")
        if self.count > 10**digits:
            raise ValueError(
                f"count: {self.terms} numbers of {self.digits} digits make {10**digits} questions, found {self.count}"
            )
        return self

    @property
    def alphabet(self) -> str:
        """The character of each token."""
        return f"0123456789{_OPERATORS[self.operation]}="

    def load(self, data_root: Path | None) -> Signals:
        """Draw distinct questions and answer them."""
        total = self.terms * self.digits
        number = np.random.default_rng([self.seed, total]).choice(10**total, self.count, replace=False)
        places = number[:, None] // 10 ** np.arange(total - 1, -1, -1) % 10
        digits = places.reshape(self.count, self.terms, self.digits)
        answer = self._answer(digits @ 10 ** np.arange(self.digits - 1, -1, -1))
        marks = np.full((self.count, self.terms, 1), 10)
        marks[:, -1] = 11
        tokens = np.concatenate([digits, marks], axis=2).reshape(self.count, -1)
        return Signals(
            items=tokens.astype(np.int64),
            labels=(answer % self.modulus).astype(np.int64),
            vocabulary=len(self.alphabet),
            attributes={"answer": answer.astype(np.int64)},
            class_names=tuple(str(number) for number in range(self.modulus)),
        )

    def _answer(self, numbers: np.ndarray) -> np.ndarray:
        if self.operation == "difference":
            return 2 * numbers[:, 0] - numbers.sum(axis=1)
        return numbers.sum(axis=1) if self.operation == "sum" else numbers.prod(axis=1)
