"""Small real networks on which spec tracing is proved, measured and tabulated."""

from __future__ import annotations

from importlib import import_module

from weightspace.testing._networks._case import CASES, Case

__all__ = ["Case", "networks"]

# Where the cases of each family are registered, loaded when first asked for: one family needs `transformers`.
_MODULES = {
    "core": ("_dense", "_convolutional", "_attention", "_recurrent"),
    "large": ("_convolutional",),
    "transformers": ("_transformers",),
}


def networks(*families: str) -> dict[str, Case]:
    """The networks of the families asked for, by name; those of ``"core"`` when none is named.

    Args:
        families: ``"core"`` (plain PyTorch, a few thousand parameters each), ``"large"`` (a ResNet-50 at full
            width) and ``"transformers"`` (models of the package of that name, from tiny configurations).

    Raises:
        ValueError: a family that does not exist.
        ModuleNotFoundError: ``"transformers"`` without that package.

    Example:
        >>> case = networks()["lenet"]
        >>> case.build()(*case.inputs()).shape
        torch.Size([2, 10])
        >>> sorted({case.family for case in networks("core", "large").values()})
        ['core', 'large']
    """
    wanted = families or ("core",)
    for family in wanted:
        if family not in _MODULES:
            raise ValueError(f"families: expected some of {', '.join(_MODULES)}, found {family!r}")
        for module in _MODULES[family]:
            import_module(f"{__name__}.{module}")
    return {name: case for name, case in CASES.items() if case.family in wanted}
