"""Shared set-up of the tests."""

import os

# Two test processes on two cores, or one on one: more threads than cores only slow tiny models down.
os.environ.setdefault("OMP_NUM_THREADS", "2")
