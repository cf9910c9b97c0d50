"""The environment of all tests. Helpers beside the tests can be imported by name (`pythonpath` in pyproject.toml)."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network
