"""One thread per process: the tests' networks are tiny, and pytest-xdist runs several of them at once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ("tests.imitation",)  # its fixtures
