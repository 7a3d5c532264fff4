"""Dd2 on a CPU with loop.compile: layers traced and differentiated ahead of time, without a code generator. Prints the graphs."""

import sys

import torch

from dd2.cli import main
from dd2.commands import run_folder
from dd2.training.layers import prepare_layers

if __name__ == "__main__":
    run_folder._check_loop = lambda *_: None  # pyright: ignore[reportPrivateUsage]
    prepare_layers.__defaults__ = ("aot_eager",)
    code = main(sys.argv[1:])
    print(f"graphs: {torch._dynamo.utils.counters['stats']['unique_graphs']}", file=sys.stderr)  # pyright: ignore
    sys.exit(code)
