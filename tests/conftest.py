"""What every test shares: a fixed seed, no network, one thread per process."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

# Set before any test module can import transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

# ``from reference.dense import ...`` finds tests/reference whatever the import mode.
TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

SHARED_DATA = TESTS.parent.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give every test the same random state, whatever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of sample data that may lie beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the sample data in {SHARED_DATA}")
    return SHARED_DATA
