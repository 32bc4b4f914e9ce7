"""Under pytest, beartype checks every shape that weightspace declares.

This does what jaxtyping's option `--jaxtyping-packages` does, but leaves out the kernels, because numba compiles
a function's own bytecode and cannot see through a wrapper around it; and tracing and the search for missed
symmetries, which declare no shapes and make a hundred thousand small calls for one network.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

import jaxtyping


class _Plain(MetaPathFinder):
    """Imports kernels, tracing and the search as they are written."""

    def find_spec(self, fullname, path=None, target=None):
        kernels = fullname.startswith("weightspace.") and fullname.endswith("._kernels")
        if kernels or fullname.startswith(("weightspace.spec.tracing.", "weightspace.spec.maximality.")):
            return PathFinder.find_spec(fullname, path, target)
        return None


assert "weightspace" not in sys.modules, "weightspace was imported before its shapes could be checked"
jaxtyping.install_import_hook("weightspace", "beartype.beartype")
sys.meta_path.insert(0, _Plain())
