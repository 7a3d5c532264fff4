"""Shared set-up of the tests."""

import os

# Tiny models gain nothing from a second thread; `make test` runs a process per core instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A package of a tiny generator with its teacher, whose classes have names."""
    from shipped import tiny_package

    return tiny_package(tmp_path_factory.mktemp("package") / "ants")


@pytest.fixture(scope="module")
def pipe(folder):
    """Its pipeline."""
    from dd2.pipeline import OneStepPipeline

    return OneStepPipeline.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture
def inception_file(tmp_path, monkeypatch) -> Path:
    """A stand-in of NVIDIA's file, taken for the verified one."""
    import torch

    from dd2.evaluation import inception
    from dd2.files import file_digest
    from texts import StandIn

    file = tmp_path / "inception.pt"
    torch.jit.script(StandIn()).save(str(file))
    monkeypatch.setattr(inception, "SHA256", file_digest(file))
    return file
