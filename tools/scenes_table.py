"""Put the scenes bench into docs/results/scenes.md: its runs, over seeds, by seen and by unseen captions.

for seed in 0 1 2: dd2 distill configs/scenes.yaml --seed N --out runs/scenes_N; dd2 evaluate … (docs/results/scenes.md)
python tools/scenes_table.py "DD2, LlamaGen"=runs/scenes_0,runs/scenes_1,runs/scenes_2 "DD2, VAR"=runs/scenes_var
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marked import put

from dd2.reproduce.page import Measured

PAGE = Path("docs/results/scenes.md")
PARTS = {"seen": Path(), "unseen": Path("prompts/scenes-unseen")}
SHOWN = {"agreement": ".3f", "frechet": ".2f", "teacher_nll": ".1f", "precision": ".3f", "recall": ".3f"}
LEFT_OUT = ("generator_nearest",)
"""Rows that say nothing here: these generators draw codes."""
KINDS = {"digit": "a digit anywhere", "tilt": "tilted", "place": "a place", "pair": "a pair", "count": "a count, anywhere"}
KEPT = ("metrics", "gap_closed", "count", "features", "seconds", "evaluation", "warnings", "groups", "speed")
HEAD = ["", "captions", "agreement", "Fréchet distance", "teacher NLL", "precision", "recall", "gap closed", "seconds"]


def main() -> None:
    """Rewrite the table and keep the numbers beside it."""
    lines = [f"| {' | '.join(HEAD)} |", "|---|---" + "|---:" * (len(HEAD) - 2) + "|"]
    kinds = [f"| | captions | {' | '.join(KINDS.values())} |", "|---|---" + "|---:" * len(KINDS) + "|"]
    kept: dict[str, Any] = {}
    for argument in sys.argv[1:]:
        title, _, folders = argument.partition("=")
        runs = [Path(folder) for folder in folders.split(",")]
        for part, inside in PARTS.items():
            numbers = [json.loads((run / inside / "metrics.json").read_text()) for run in runs]
            kept.setdefault(title, {})[part] = [{key: found[key] for key in KEPT if key in found} for found in numbers]
            lines += [row(title, part, name, numbers) for name in numbers[0]["metrics"] if name not in LEFT_OUT]
            kinds += [by_kind(title, part, name, numbers) for name in ("teacher", "generator")]
        shutil.copy(runs[0] / "prompts.png", PAGE.with_name(f"scenes_{_name(title)}_seen.png"))
        shutil.copy(runs[0] / PARTS["unseen"] / "prompts.png", PAGE.with_name(f"scenes_{_name(title)}_unseen.png"))
        shutil.copy(runs[0] / "curves.png", PAGE.with_name(f"scenes_{_name(title)}_curves.png"))
    put(PAGE, "scenes", "\n".join(lines) + "\n")
    put(PAGE, "scenes by kind", "\n".join(kinds) + "\n")
    PAGE.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join([*lines, "", *kinds]))


def row(title: str, part: str, name: str, numbers: list[dict[str, Any]]) -> str:
    """One method of one kind of teacher, its mean and spread over seeds."""
    measured = [found["metrics"][name] for found in numbers if name in found["metrics"]]  # some rows are of the first seed alone
    cells = [_spread([metrics.get(key) for metrics in measured], kind) for key, kind in SHOWN.items()]
    own = name == "generator"
    gap = _spread([found["gap_closed"] for found in numbers], ".3f") if own else ""
    trained = [sum(value for key, value in found["seconds"].items() if key not in ("evaluate", "total")) for found in numbers]
    called = numbers[0]["methods"][name]
    said = f"**{title}**: {called}" if own else f"{title}: {called}"
    return f"| {said} | {part} | {' | '.join(cells)} | {gap} | {_spread(trained, '.0f') if own and part == 'seen' else ''} |"


def by_kind(title: str, part: str, name: str, numbers: list[dict[str, Any]]) -> str:
    """Agreement of one method with each kind of caption."""
    cells = [
        _spread([found["groups"].get(kind, {}).get(name, {}).get("agreement") for found in numbers], ".3f") for kind in KINDS
    ]
    return f"| {title}: {numbers[0]['methods'][name]} | {part} | {' | '.join(cells)} |"


def _spread(values: Sequence[float | None], kind: str) -> str:
    known = [value for value in values if value is not None]
    return Measured(known).shown(kind) if known else ""


def _name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


if __name__ == "__main__":
    main()
