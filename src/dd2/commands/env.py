"""dd2 env: what a report of a fault needs to say of the machine."""

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

import torch

import dd2
from dd2.precision import fast_bfloat16
from dd2.processes import say
from dd2.provenance import commit
from dd2.resources import available_memory

LIBRARIES = ("torch", "numpy", "pillow", "safetensors", "tyro", "scikit-learn", "scipy", "matplotlib")
EXTRAS = {
    "hub": ("huggingface_hub",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "demo": ("gradio",),
    "api": ("fastapi", "uvicorn"),
    "logs": ("tensorboard",),
    "t2i": ("transformers",),
    "diffusers": ("diffusers",),
    "docs": ("mkdocs-material", "mkdocstrings"),
}
"""Extra -> packages whose versions tell it."""

SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE")
"""Environment variables that change what dd2 does. None of them is a secret."""


@dataclass(frozen=True)
class EnvConfig:
    """Print versions, devices and paths, for a report of a fault. Nothing in it is secret."""


def env(config: EnvConfig) -> dict[str, str]:
    """Print and return them."""
    found = {
        "dd2": f"{dd2.__version__}{f', commit {made}' if (made := commit()) else ''}",
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        **{name: _version(name) for name in LIBRARIES},
        **{f"extra {name}": ", ".join(f"{part} {_version(part)}" for part in parts) for name, parts in EXTRAS.items()},
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_gigabytes(torch.device('cpu'))} free"
        + (", bfloat16" if fast_bfloat16(torch.device("cpu")) else ""),
        **_gpus(),
        "installed at": os.path.dirname(dd2.__file__),
        "working directory": os.getcwd(),
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
    }
    width = max(map(len, found))
    for name, value in found.items():
        say(f"{name:{width}}  {value}")
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": f"none that torch can use (CUDA build: {torch.version.cuda or 'none'})"}
    return {
        f"gpu {index}": f"{torch.cuda.get_device_name(index)}, {_gigabytes(torch.device('cuda', index))} free, "
        f"CUDA {torch.version.cuda}"
        for index in range(torch.cuda.device_count())
    }


def _gigabytes(device: torch.device) -> str:
    return f"{available_memory(device) / 1e9:.1f} GB"
