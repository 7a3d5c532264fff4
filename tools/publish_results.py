"""Put the numbers and pictures of finished runs into README.md and docs/results, between their markers.

dd2 demo && dd2 distill configs/digits_long.yaml && dd2 evaluate runs/digits_long
python tools/publish_results.py demo=runs/demo digits_long=runs/digits_long
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from dd2.evaluation.score import few_steps_of

ROWS = {
    "teacher": ("Teacher, {ar_steps} AR steps", "floor"),
    "ar_diffusion": ("AR-diffusion (stage 1), {ar_steps} AR steps", "ar_diffusion"),
    "generator": ("**Generator, one step**", "generator"),
    "generator_nearest": ("Generator, one step, nearest codes", "generator_nearest"),
    "onestep_marginal": ("onestep\\*, independent tokens", "onestep_marginal"),
}
PAGES = (Path("README.md"), *sorted(Path("docs/results").glob("*.md")))


def main() -> None:
    """Copy results and rewrite the tables."""
    results = Path("docs/results")
    results.mkdir(parents=True, exist_ok=True)
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        run = Path(folder)
        numbers = json.loads((run / "metrics.json").read_text())
        versions = json.loads((run / "versions.json").read_text())
        numbers["versions"] = {key: versions[key] for key in ("dd2", "python", "torch", "numpy", "threads")}
        (results / f"{name}.json").write_text(json.dumps(numbers, indent=2) + "\n")
        shutil.copy(run / "samples.png", results / f"{name}_samples.png")
        shutil.copy(run / "curves.png", results / f"{name}_curves.png")
        for page in PAGES:
            marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
            page.write_text(marked.sub(lambda m, n=numbers: m[1] + table(n) + m[2], page.read_text()))


def table(numbers: dict[str, Any]) -> str:
    """The numbers of one run in Markdown."""
    lines = ["| | Fréchet distance | teacher NLL (nats/image) | accuracy |", "|---|---:|---:|---:|"]
    few = {name: (f"Generator and teacher, {k} steps", name) for name in numbers["teacher_nll"] if (k := few_steps_of(name))}
    for name, (title, frechet) in (ROWS | few).items():
        nll, accuracy = numbers["teacher_nll"][name], numbers["accuracy"][name]
        lines.append(f"| {title.format(**numbers)} | {numbers['frechet'][frechet]:.2f} | {nll:.1f} | {accuracy:.3f} |")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in numbers["seconds"].items())
    speeds = ", ".join(
        f"{entry['speedup']:.1f}× at batch {entry['batch']}" for entry in sorted(numbers["speed"], key=lambda e: e["batch"])
    )
    threads = numbers["versions"]["threads"]
    lines += [
        "",
        f"Gap closed: **{numbers['gap_closed']:.3f}**. Faster than the KV-cached teacher, decoding included: {speeds}.",
        f"Time on {threads} CPU thread{'s' if threads > 1 else ''}: {spent}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
