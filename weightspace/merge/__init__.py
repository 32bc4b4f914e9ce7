"""Many networks into one."""

from weightspace.merge._average import average

__all__ = ["average"]
