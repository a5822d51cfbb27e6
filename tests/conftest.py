"""What every test needs: no network, no tracker, and one thread pool that fits two cores."""

import glob
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if glob.glob("/dev/nvidia[0-9]*") else "cpu")
# The tests' tensors are tiny: a second thread would only wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MINUTES_LONG = ("test_readme_commands.py", "test_ledger.py", "test_gpu_code.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files that take one worker minutes run first, so that the other workers do not wait for them at the end."""
    items.sort(key=lambda item: item.path.name not in MINUTES_LONG)
