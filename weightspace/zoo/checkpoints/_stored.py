"""Networks whose tensors are read one at a time, when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of one network under their ``state_dict`` names; looking at names and shapes reads none of them.

    Whoever asks for a tensor owns it: the same name read twice gives two tensors, and the memory of each is free
    when the tensor is.
    """

    @abstractmethod
    def meta(self, name: str) -> Tensor:
        """A tensor of that shape and type on the meta device.

        Raises:
            KeyError: there is no such tensor.
        """

    def tied(self, name: str) -> object:
        """What tells the storage of a tensor from others': equal for names of one tensor (tied weights)."""
        return name


class HeldWeights(StoredWeights):
    """Tensors that are in memory, or mapped into it, already.

    Args:
        tensors: by name; names that share one storage are tied.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def meta(self, name: str) -> Tensor:
        """See :meth:`StoredWeights.meta`."""
        tensor = self._tensors[name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def tied(self, name: str) -> object:
        """See :meth:`StoredWeights.tied`."""
        tensor = self._tensors[name]
        if not tensor.numel():
            return name
        return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def meta_of(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Shape and type of a network's tensor, which is not read where the network can do without.

    Example:
        >>> meta_of({"w": torch.zeros(2, 3)}, "w")
        tensor(..., device='meta', size=(2, 3))
    """
    return weights.meta(name) if isinstance(weights, StoredWeights) else HeldWeights(weights).meta(name)


def bytes_of(meta: Tensor) -> int:
    """What a tensor takes in memory and in a file."""
    return meta.numel() * meta.element_size()
