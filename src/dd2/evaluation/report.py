"""Finished runs for people: samples.png, curves.png, and one self-contained page, report.html."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dd2.evaluation.columns import COLUMNS
from dd2.evaluation.gallery import titled
from dd2.evaluation.latency import Point, latency_plot, latency_rows, points_of
from dd2.evaluation.plots import curves, explained
from dd2.files import write_atomic
from dd2.images import png
from dd2.provenance import read_versions
from dd2.records import Shape
from dd2.training.metrics import MetricsLog

STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--page:#fff;--line:#ddd;--soft:#f2f4f7;--quiet:#5c5c5c;--alarm:#fff4e0}
@media(prefers-color-scheme:dark){
:root{--ink:#e8e8e8;--page:#141414;--line:#3a3a3a;--soft:#23262b;--quiet:#a8a8a8;--alarm:#40300f}}
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:var(--ink);background:var(--page)}
img{max-width:100%;image-rendering:pixelated}img.plot{image-rendering:auto}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:1rem 0;font-size:14px}
td,th{padding:.3rem .5rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left;min-width:9rem}
small,.note{color:var(--quiet)}.best{font-weight:600}.run td{background:var(--soft);font-weight:600}
.warning{background:var(--alarm);padding:.4rem .6rem}
pre{background:var(--soft);padding:1rem;overflow:auto;font-size:13px}
"""


METRICS: dict[Any, Shape] = {
    "methods": {str: str},
    "metrics": {str: {str: float}},
    "distinct_sequences": {str: int},
    "gap_closed": float,
    "count": int,
    "features": str,
    "seconds": {str: float},
    "evaluation": {
        **dict.fromkeys(("count", "batch", "seed"), int),
        **dict.fromkeys(("features", "prefix", "marginal"), str),
        **{f"{name}?": [int] for name in ("steps", "skip", "teacher_steps")},
        "precision?": str,
        "guidance?": bool,
        "reference": {"reference": str},
    },
    "speed?": [{"batch": int, "seconds_per_image": {str: float}, "speedup": float}],
    "speedup_vs_teacher?": float,
    "speedup_batch?": int,
    "absent?": [str],
    "warnings": [str],
}
"""What a page needs of a run's metrics.json."""


@dataclass(frozen=True)
class Section:
    """One evaluated run of a report.

    Attributes:
        run: its folder, with metrics.jsonl, config.yaml and versions.json.
        numbers: content of metrics.json.
        images: (N, channels, H, W) of each method at the same labels.
        pictures: further pictures: (title, explanation, images as a PNG file).
    """

    run: Path
    numbers: dict[str, Any]
    images: dict[str, Tensor]
    pictures: list[tuple[str, str, bytes]] = field(default_factory=list)

    @cached_property
    def versions(self) -> dict[str, Any]:
        """What made it."""
        return read_versions(self.run / "versions.json")

    @cached_property
    def curves(self) -> bytes:
        """Its training curves as a PNG file."""
        return curves(MetricsLog(self.run / "metrics.jsonl").rows())


def write_run_report(section: Section, place: Path) -> None:
    """Write samples.png, curves.png and report.html into a folder: the run's own, or one inside it."""
    write_atomic(place / "samples.png", png(titled(_blocks([section]))))
    write_atomic(place / "curves.png", section.curves)
    write_atomic(place / "report.html", page([section]))


def page(sections: Sequence[Section], others: Sequence[Point] = ()) -> str:
    """The report as one HTML page without any outside reference, light or dark as the reader's system is.

    Args:
        sections: the runs.
        others: points of others' models for the plot of quality against latency.
    """
    names = ", ".join(section.run.name for section in sections)
    samples = png(titled(_blocks(sections)))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>dd2: {html.escape(names)}</title>
<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>{"One-step generator" if len(sections) == 1 else "One-step generators"}: {html.escape(names)}</h1>
{"".join(_summary(section) for section in sections)}
<h2>Samples</h2><p class="note">The same labels in the same places.</p><img alt="samples of all methods" src="{_inline(samples)}">
<h2>Numbers</h2>{_table(sections)}{_definitions(sections[0].numbers)}{"".join(map(_decides, sections))}
{_latency(sections, others)}{_speed(sections)}{"".join(map(_further, sections))}
<h2>Curves</h2>{"".join(map(_curves_of, sections))}<ul>{_explanations(sections)}</ul>
<h2>How it was made</h2>{"".join(map(_made, sections))}
</body></html>
"""


def _blocks(sections: Sequence[Section]) -> list[tuple[str, Tensor]]:
    """Every method's images; the teacher and onestep* of further runs are those of the first."""
    blocks = []
    for index, section in enumerate(sections):
        for name, title in section.numbers["methods"].items():
            if name == "generator_nearest" or (index and name in ("teacher", "onestep_marginal")):
                continue
            run = f"{section.run.name}: " if len(sections) > 1 and name not in ("teacher", "onestep_marginal") else ""
            blocks.append((run + title, section.images[name]))
    return blocks


def _summary(section: Section) -> str:
    numbers = section.numbers
    faster = ""
    if "speed" in numbers:
        faster = (
            f", <b>{numbers['speedup_vs_teacher']:.1f} times faster</b> at batch {numbers['speedup_batch']}, decoding included"
        )
    said = "".join(f'<p class="warning"><b>Warning:</b> {html.escape(text)}</p>' for text in section.numbers["warnings"])
    return said + (
        f"<p><b>{html.escape(section.run.name)}</b>: gap closed <b>{numbers['gap_closed']:.3f}</b> of the way from independent "
        f"tokens (0) to the teacher itself (1){faster}.</p>"
    )


def _table(sections: Sequence[Section]) -> str:
    found = [values for section in sections for values in section.numbers["metrics"].values()]
    used = {key: column for key, column in COLUMNS.items() if any(key in values for values in found)}
    head = "".join(f"<th>{name}</th>" for name, _ in used.values())
    body = ""
    for section in sections:
        if len(sections) > 1:
            body += f'<tr class="run"><td colspan="{len(used) + 2}">{html.escape(section.run.name)}</td></tr>'
        for name, title in section.numbers["methods"].items():
            values = section.numbers["metrics"][name]
            row = "".join(f"<td>{_with_interval(values, key, kind)}</td>" for key, (_, kind) in used.items())
            distinct = section.numbers["distinct_sequences"].get(name)
            cell = "–" if distinct is None else f"{distinct:,}"
            body += f"<tr{' class=best' if name == 'generator' else ''}><td>{html.escape(title)}</td>{row}<td>{cell}</td></tr>"
    return f'<div class="wide"><table><tr><th>method</th>{head}<th>distinct</th></tr>{body}</table></div>'


def _with_interval(values: dict[str, float], key: str, kind: str) -> str:
    if key not in values:
        return "–"
    half_width = values.get(f"{key}_95")
    return format(values[key], kind) + (f"<small> ±{format(half_width, kind)}</small>" if half_width is not None else "")


def _definitions(numbers: dict[str, Any]) -> str:
    reference = html.escape(str(numbers["evaluation"]["reference"]["reference"]))
    return f"""<p class="note">Fréchet distance: between Gaussians fitted to features ({html.escape(numbers["features"])}) of
{numbers["count"]:,} samples of each method and of the reference ({reference}); with the teacher as reference, its own row is the
floor: {numbers["count"]:,} other samples of its own. Teacher NLL: nats per image that the teacher assigns to the (nearest-code)
sequences; lower than the teacher's own means less varied, higher means less plausible. Distinct: different token sequences
among them. Within-class spread: mean squared distance of features to their class's mean; less than the teacher's is less variety
within a class. ±: half the width of the 95 % interval for other samples of the same method.</p>"""


def _decides(section: Section) -> str:
    """What could make the numbers differ from somebody else's."""
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in section.numbers["evaluation"].items()
    )
    said = "".join(f"<p><b>Not measured:</b> {html.escape(text)}</p>" for text in section.numbers.get("absent", []))
    heading = f"What decides the numbers of {html.escape(section.run.name)}"
    return f"{said}<details><summary>{heading}</summary><div class=wide><table>{rows}</table></div></details>"


def _latency(sections: Sequence[Section], others: Sequence[Point]) -> str:
    """Distance against seconds, where there is more than one way to draw that was timed."""
    names = [section.run.name for section in sections]
    called = names if len(set(names)) == len(names) else [str(section.run) for section in sections]
    points = [point for name, section in zip(called, sections, strict=True) for point in points_of(name, section.numbers)]
    if len(points) + len(others) < 2:
        return ""
    given = " Points of other models are as their file gives them." if others else ""
    return f"""<h2>Quality against latency</h2><p class="note">One image at a time (the smallest batch that was timed), decoding
included, on this machine; lower and further left is better.{given}</p>
<img class="plot" alt="quality against latency" src="{_inline(latency_plot([*points, *others]))}">
<div class="wide"><table><tr><th>method</th><th>ms an image</th><th>Fréchet distance</th></tr>
{latency_rows([*points, *others])}</table></div>"""


def _speed(sections: Sequence[Section]) -> str:
    rows = ""
    for section in sections:
        for entry in sorted(section.numbers.get("speed", []), key=lambda entry: entry["batch"]):
            cells = [f"{1000 * entry['seconds_per_image'][name]:.2f}" for name in ("teacher", "generator", "decoding_alone")]
            rows += f"<tr><td>{html.escape(section.run.name)}</td><td>{entry['batch']}</td>"
            rows += "".join(f"<td>{cell}</td>" for cell in cells) + f"<td>{entry['speedup']:.1f}</td></tr>"
    spent = "".join(
        f"<p>Seconds of {html.escape(section.run.name)}: "
        + ", ".join(f"{name} {value:.0f}" for name, value in section.numbers["seconds"].items())
        + f"; threads: {section.versions['threads']}.</p>"
        for section in sections
    )
    if not rows:
        return f"<h2>Time</h2>{spent}"
    return f"""<h2>Speed</h2><div class="wide"><table>
<tr><th>run</th><th>batch</th><th>teacher, ms/image</th><th>generator, ms/image</th>
<th>of which decoding</th><th>ratio</th></tr>{rows}</table></div>
<p class="note">Whole images, both in turns in one process; medians. At large batches arithmetic decides, of which one pass has
hardly less than all cached steps; at small ones the teacher waits for every token.</p>{spent}"""


def _further(section: Section) -> str:
    return "".join(
        f'<h2>{html.escape(section.run.name)}: {html.escape(heading)}</h2><p class="note">{html.escape(text)}</p>'
        f'<img alt="{html.escape(heading)}" src="{_inline(picture)}">'
        for heading, text, picture in section.pictures
    )


def _curves_of(section: Section) -> str:
    name = html.escape(section.run.name)
    return f'<h3>{name}</h3><img class="plot" alt="training curves of {name}" src="{_inline(section.curves)}">'


def _explanations(sections: Sequence[Section]) -> str:
    found: dict[str, str] = {}
    for section in sections:
        found |= explained(MetricsLog(section.run / "metrics.jsonl").rows())
    return "".join(f"<li><b>{html.escape(panel)}.</b> {html.escape(text)}</li>" for panel, text in found.items())


def _made(section: Section) -> str:
    config = (section.run / "config.yaml").read_text()
    return (
        f"<details><summary>{html.escape(section.run.name)}</summary><pre>{html.escape(config)}</pre>"
        f"<pre>{html.escape(json.dumps(section.versions, indent=2))}</pre></details>"
    )


def _inline(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
