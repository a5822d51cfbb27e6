"""What every test needs: no network, no tracker, and one thread pool that fits two cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")
# The tests' tensors are tiny: a second thread would only wait for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
