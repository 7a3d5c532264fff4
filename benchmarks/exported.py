"""Size and speed of exported graphs beside PyTorch: python benchmarks/exported.py runs/demo --out docs/results/exported

The one pass, decoding included, float32, the three taking turns; onnxruntime and PyTorch on the same number of threads.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dd2.checkpoints.runs import open_generator
from dd2.evaluation.speed import seconds_per_call
from dd2.files import write_atomic
from dd2.provenance import provenance
from dd2.shipping.graph import ENDINGS, Format, OnePass, run_onnx, write_graph

BATCHES = (1, 16, 64)


def main() -> None:
    """Measure and write OUT.json and OUT.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("exported"))
    given = parser.parse_args()
    rows = [row for run in given.runs for row in measured(run)]
    made = provenance("benchmarks/exported.py", torch.device("cpu"))
    write_atomic(given.out.with_suffix(".json"), json.dumps({"rows": rows, "made": made}, indent=2) + "\n")
    head = "| run | batch | PyTorch, ms | torch.export, ms | ONNX Runtime, ms | PyTorch / ONNX |\n" + "|---" + "|---:" * 5 + "|\n"
    lines = [
        f"| {row['run']} | {row['batch']} | {1000 * row['eager']:.2f} | {1000 * row['torch']:.2f} | {1000 * row['onnx']:.2f} | "
        f"{row['eager'] / row['onnx']:.2f}× |"
        for row in rows
    ]
    sizes = {row["run"]: row["bytes"] for row in rows}
    said = "; ".join(
        f"{run}: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found.items()) for run, found in sizes.items()
    )
    text = head + "\n".join(lines) + f"\n\nMilliseconds a batch, {made['threads']} threads. Sizes: {said}.\n"
    write_atomic(given.out.with_suffix(".md"), text)
    print(text)


def measured(run: Path) -> list[dict]:
    """Seconds of each form at each batch."""
    generator = open_generator(run, torch.device("cpu"))
    one_pass = OnePass(generator).eval()
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[Format, Path] = {name: Path(scratch) / f"g{ending}" for name, ending in ENDINGS.items()}
        for name, file in files.items():
            write_graph(file, generator, name)
        half = Path(scratch) / "half.onnx"
        write_graph(half, generator, "onnx", torch.float16)
        sizes = {name: file.stat().st_size for name, file in {**files, "onnx in float16": half}.items()}
        forms: dict[str, Callable[..., torch.Tensor]] = {
            "eager": one_pass,
            "torch": torch.export.load(files["torch"]).module(),
            "onnx": run_onnx(files["onnx"]),
        }
        rows = []
        for batch in BATCHES:
            inputs = one_pass.example(batch, 0)
            with torch.inference_mode():
                taken = seconds_per_call({name: partial(form, *inputs) for name, form in forms.items()}, 15)
            rows.append({"run": run.name, "batch": batch, **taken, "bytes": sizes})
        return rows


if __name__ == "__main__":
    main()
