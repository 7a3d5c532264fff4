"""Put the numbers and pictures of finished runs into README.md and docs/results, between their markers.

dd2 demo && dd2 distill configs/digits_long.yaml && dd2 evaluate runs/digits_long
python tools/publish_results.py demo=runs/demo digits_long=runs/digits_long
"""

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from dd2.evaluation.columns import COLUMNS

SHOWN = {"frechet": "", "teacher_nll": " (nats/image)", "accuracy": ""}
"""The table's columns, with their units."""
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
    found = numbers["metrics"]
    used = [key for key in SHOWN if any(key in values for values in found.values())]
    headings = [COLUMNS[key].heading + SHOWN[key] for key in used]
    lines = [f"| | {' | '.join(headings)} |", "|---|" + "---:|" * len(used)]
    for name, title in numbers["methods"].items():
        escaped = title.replace("*", r"\*")
        cells = [format(found[name][key], COLUMNS[key].kind) if key in found[name] else "–" for key in used]
        lines.append(f"| {f'**{escaped}**' if name == 'generator' else escaped} | {' | '.join(cells)} |")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in numbers["seconds"].items())
    speeds = ", ".join(
        f"{entry['speedup']:.1f}× at batch {entry['batch']}" for entry in sorted(numbers["speed"], key=lambda e: e["batch"])
    )
    threads = numbers["versions"]["threads"]
    text = (
        f"Gap closed: **{numbers['gap_closed']:.3f}**. Faster than the KV-cached teacher, decoding included: {speeds}. "
        f"Time on {threads} CPU thread{'s' if threads > 1 else ''}: {spent}."
    )
    return "\n".join([*lines, "", *textwrap.wrap(text, 124), ""])


if __name__ == "__main__":
    main()
