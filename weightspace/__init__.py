"""weightspace: learning on the weights of neural networks."""

from weightspace.spec import WeightSpec

__version__ = "0.1.0"
__all__ = ["WeightSpec"]
