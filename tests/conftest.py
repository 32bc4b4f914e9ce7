"""Settings and fixtures for all tests."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# The workers of pytest-xdist fill the cores; threads inside them would only wait for each other.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# A first call that compiles or loads something is slow, not wrong. In CI the same code gets the same verdict.
hypothesis.settings.register_profile("weightspace", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("weightspace")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of data sets: WEIGHTSPACE_DATA, or shared/data beside the repository; skips without one."""
    default = REPOSITORY.parent / "shared" / "data"
    root = Path(os.environ.get("WEIGHTSPACE_DATA") or default)
    if not root.is_dir():
        pytest.skip(f"no data sets in {root}: set WEIGHTSPACE_DATA to their folder")
    return root
