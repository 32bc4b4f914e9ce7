"""Single networks in and out: rows of zoos, safetensors (sharded too) and state dicts, read one tensor at a time."""

from weightspace.zoo.checkpoints._differences import Difference, differences
from weightspace.zoo.checkpoints._network import Network, load_network, open_network
from weightspace.zoo.checkpoints._stored import HeldWeights, StoredWeights, bytes_of, meta_of
from weightspace.zoo.checkpoints._write import (
    check_checkpoint_output,
    free_space,
    save_network,
    write_tensors,
)

__all__ = [
    "Difference",
    "HeldWeights",
    "Network",
    "StoredWeights",
    "bytes_of",
    "check_checkpoint_output",
    "differences",
    "free_space",
    "load_network",
    "meta_of",
    "open_network",
    "save_network",
    "write_tensors",
]
