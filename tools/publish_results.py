"""Put the numbers and pictures of finished runs into README.md and docs/results, between their markers.

dd2 demo && dd2 distill configs/digits_long.yaml && dd2 evaluate runs/digits_long
python tools/publish_results.py demo=runs/demo digits_long=runs/digits_long

The README's table of methods side by side is made of what docs/results holds of the runs in `SIDE_BY_SIDE`.
"""

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from marked import put

from dd2.evaluation.columns import COLUMNS

SHOWN = {"frechet": "", "teacher_nll": " (nats/image)", "accuracy": ""}
"""The table's columns, with their units."""
SIDE_BY_SIDE = {
    "demo_paper": "DD2, the paper's recipe (`dd2 demo --recipe paper`)",
    "demo": "DD2, this library's recipe (`dd2 demo`)",
    "digits_dd1_5000": "DD1, 5,000 iterations (`dd2 dd1 configs/digits_dd1.yaml --train.iterations 5000`)",
    "digits_dd1": "DD1, 8,000 iterations (`dd2 dd1 configs/digits_dd1.yaml`)",
    "digits_long": "DD2, this library's recipe (`configs/digits_long.yaml`)",
}
"""Runs by the name of their results, and what they are called."""
COLUMNS_BESIDE = ("frechet", "precision", "recall", "teacher_nll", "accuracy")
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
        for session in (versions, *versions.get("resumed", ())):  # they may name folders of a machine, as cache does below
            session.pop("command", None)
        numbers["versions"] = versions
        numbers["evaluation"].pop("cache", None)
        (results / f"{name}.json").write_text(json.dumps(numbers, indent=2) + "\n")
        shutil.copy(run / "samples.png", results / f"{name}_samples.png")
        shutil.copy(run / "curves.png", results / f"{name}_curves.png")
        for page in PAGES:
            put(page, name, table(numbers))
    put(PAGES[0], "side by side", side_by_side(results))


def side_by_side(results: Path) -> str:
    """The generators of several runs in Markdown, with the teacher's own numbers above."""
    found = {
        name: json.loads((results / f"{name}.json").read_text()) for name in SIDE_BY_SIDE if (results / f"{name}.json").is_file()
    }
    headings = [COLUMNS[key].heading for key in COLUMNS_BESIDE]
    lines = [f"| one step | training | gap closed | {' | '.join(headings)} |", "|---|---:|---:|" + "---:|" * len(headings)]

    def cells(values: dict[str, float]) -> str:
        return " | ".join(format(values[key], COLUMNS[key].kind) for key in COLUMNS_BESIDE)

    lines.append(f"| teacher, 16 steps | | | {cells(found['demo']['metrics']['teacher'])} |")
    for name, numbers in found.items():
        threads = numbers["versions"]["threads"]
        spent = sum(value for part, value in numbers["seconds"].items() if part not in ("evaluate", "total"))
        training = f"{spent:.0f} s, {threads} thread{'s' if threads > 1 else ''}"
        values = cells(numbers["metrics"]["generator"])
        lines.append(f"| {SIDE_BY_SIDE[name]} | {training} | {numbers['gap_closed']:.3f} | {values} |")
    return "\n".join([*lines, ""])


def table(numbers: dict[str, Any]) -> str:
    """The numbers of one run in Markdown."""
    found = numbers["metrics"]
    used = [key for key in SHOWN if any(key in values for values in found.values())]
    headings = [COLUMNS[key].heading + SHOWN[key] for key in used]
    lines = [f"| | {' | '.join(headings)} |", "|---|" + "---:|" * len(used)]
    for name, title in numbers["methods"].items():
        escaped = title.replace("*", r"\*")
        cells = [format(found[name][key], COLUMNS[key].kind) if key in found[name] else "–" for key in used]
        lines.append(f"| {f'**{escaped}**' if name == 'generator' else escaped} | {' | '.join(cells)} |")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in numbers["seconds"].items())
    measured = sorted(numbers.get("speed", []), key=lambda entry: entry["batch"])
    speeds = ", ".join(f"{entry['speedup']:.1f}× at batch {entry['batch']}" for entry in measured)
    faster = f"Faster than the teacher (KV-cached where it can be), decoding included: {speeds}. " if speeds else ""
    threads = numbers["versions"]["threads"]
    text = (
        f"Gap closed: **{numbers['gap_closed']:.3f}**. {faster}Time on {threads} CPU thread{'s' if threads > 1 else ''}: {spent}."
        + (f" Commit {commit}." if (commit := numbers["versions"].get("commit")) else "")
    )
    return "\n".join([*lines, "", *textwrap.wrap(text, 124), ""])


if __name__ == "__main__":
    main()
