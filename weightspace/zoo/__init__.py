"""The zoo: populations of networks in one HDF5 file, and single checkpoints in and out."""

from weightspace.zoo._architectures import spec_of
from weightspace.zoo._checkpoints import (
    Network,
    check_checkpoint_output,
    load_network,
    load_networks,
    save_network,
)
from weightspace.zoo._files import (
    FORMAT_VERSION,
    atomic_path,
    canonical_json,
    check_output,
    content_digest,
    join_zoos,
    verify_digest,
)
from weightspace.zoo._show import draw_zoo, render, source_of
from weightspace.zoo._zoo import SPLITS, Population, Source, Zoo, split_items

__all__ = [
    "FORMAT_VERSION",
    "SPLITS",
    "Network",
    "Population",
    "Source",
    "Zoo",
    "atomic_path",
    "canonical_json",
    "check_checkpoint_output",
    "check_output",
    "content_digest",
    "draw_zoo",
    "join_zoos",
    "load_network",
    "load_networks",
    "render",
    "save_network",
    "source_of",
    "spec_of",
    "split_items",
    "verify_digest",
]
