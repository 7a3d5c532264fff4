"""Shared set-up of the tests."""

import os

# Tiny models gain nothing from a second thread; `make test` runs a process per core instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")
