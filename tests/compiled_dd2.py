"""Dd2 on a CPU with loop.compile: layers traced and differentiated ahead of time, without a code generator. Prints the graphs."""

import sys
from functools import partial

import torch

from dd2.cli import main
from dd2.jobs import distill, run_folder
from dd2.training import layers, loop

if __name__ == "__main__":
    run_folder._check_loop = lambda *_: None  # pyright: ignore[reportPrivateUsage]
    loop.prepare_layers = distill.prepare_layers = partial(layers.prepare_layers, compiler="aot_eager")
    code = main(sys.argv[1:])
    print(f"graphs: {torch._dynamo.utils.counters['stats']['unique_graphs']}", file=sys.stderr)  # pyright: ignore
    sys.exit(code)
