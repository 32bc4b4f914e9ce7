"""Under pytest, beartype checks every shape that weightspace declares.

This does what jaxtyping's option `--jaxtyping-packages` does, but leaves out the kernels: numba compiles a
function's own bytecode and cannot see through a wrapper around it.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

import jaxtyping


class _PlainKernels(MetaPathFinder):
    """Imports the modules named `_kernels` as they are written."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith("weightspace.") and fullname.endswith("._kernels"):
            return PathFinder.find_spec(fullname, path, target)
        return None


assert "weightspace" not in sys.modules, "weightspace was imported before its shapes could be checked"
jaxtyping.install_import_hook("weightspace", "beartype.beartype")
sys.meta_path.insert(0, _PlainKernels())
