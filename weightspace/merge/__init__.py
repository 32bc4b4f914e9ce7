"""Many networks into one."""

from weightspace.merge._average import average, weighted
from weightspace.merge._dare import dare, dare_ties
from weightspace.merge._fisher import fisher
from weightspace.merge._fisher_information import fisher_information
from weightspace.merge._gradient_matching import gradient_matching
from weightspace.merge._greedy_soup import greedy_soup, soup_members
from weightspace.merge._input_grams import input_grams
from weightspace.merge._model_stock import model_stock
from weightspace.merge._registry import (
    MERGERS,
    LazyMerge,
    Merger,
    find_merger,
    merge_networks,
    merger,
    prepare,
    stream,
)
from weightspace.merge._regmean import regmean
from weightspace.merge._slerp import slerp
from weightspace.merge._stack import Block, Stack
from weightspace.merge._task_arithmetic import task_arithmetic
from weightspace.merge._ties import ties

STATISTICS = {"fisher": fisher_information, "grams": input_grams}
"""What :attr:`Merger.statistics` names: ``(module, weights, data) -> statistics`` of one network."""

__all__ = [
    "MERGERS",
    "STATISTICS",
    "Block",
    "LazyMerge",
    "Merger",
    "Stack",
    "average",
    "dare",
    "dare_ties",
    "find_merger",
    "fisher",
    "fisher_information",
    "gradient_matching",
    "greedy_soup",
    "input_grams",
    "merge_networks",
    "merger",
    "model_stock",
    "prepare",
    "regmean",
    "slerp",
    "soup_members",
    "stream",
    "task_arithmetic",
    "ties",
    "weighted",
]
