"""The result of a run for people: samples.png, curves.png and one self-contained report.html."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from dd2.evaluation.plots import EXPLAINED, curves
from dd2.evaluation.score import few_steps_of
from dd2.files import write_atomic
from dd2.images import grid, png
from dd2.training.metrics import MetricsLog

TITLES = {
    "teacher": "Teacher (all AR steps)",
    "ar_diffusion": "AR-diffusion, stage 1 (all AR steps, 10 Euler steps each)",
    "generator": "Generator (one step)",
    "generator_nearest": "Generator (one step), nearest codes",
    "onestep_marginal": "onestep*: independent tokens",
}
PICTURED = ("teacher", "ar_diffusion", "generator", "onestep_marginal")
COLUMNS = 20

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
img{max-width:100%;image-rendering:pixelated}table{border-collapse:collapse;margin:1rem 0;font-size:14px}
td,th{padding:.3rem .55rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
.best{font-weight:600}pre{background:#f6f6f6;padding:1rem;overflow:auto;font-size:13px}.note{color:#555}
"""


def write_report(run: Path, numbers: dict[str, Any], images: dict[str, Tensor]) -> None:
    """Write samples.png, curves.png and report.html into the run's folder.

    Args:
        run: the run, with its metrics.jsonl and config.yaml.
        numbers: content of metrics.json.
        images: (N, channels, H, W) of each method at the same labels.
    """
    samples = png(side_by_side(images))
    plotted = curves(MetricsLog(run / "metrics.jsonl").rows())
    write_atomic(run / "samples.png", samples)
    write_atomic(run / "curves.png", plotted)
    write_atomic(run / "report.html", page(run, numbers, samples, plotted))


def title(name: str) -> str:
    """What a method is called in tables and pictures."""
    k = few_steps_of(name)
    last = "AR step" if k == 2 else f"{k - 1} AR steps"
    return f"Generator, the last {last} by the teacher ({k} steps)" if k else TITLES[name]


def side_by_side(images: dict[str, Tensor]) -> Image.Image:
    """The methods' images under each other, the same label in the same place."""
    few = [name for name in images if few_steps_of(name)]
    blocks = [(title(name), grid(images[name], COLUMNS)) for name in (*PICTURED, *few) if name in images]
    caption = 22
    width = max(block.width for _, block in blocks)
    sheet = Image.new("RGB", (width, sum(block.height + caption for _, block in blocks)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for heading, block in blocks:
        draw.text((4, top + 4), heading, fill="black", font_size=14)
        sheet.paste(block, (0, top + caption))
        top += block.height + caption
    return sheet


def page(run: Path, numbers: dict[str, Any], samples: bytes, plotted: bytes) -> str:
    """The report as one HTML page without any outside reference."""
    speeds = "".join(
        f"<tr><td>{entry['batch']}</td><td>{1000 * entry['seconds_per_image']['teacher']:.2f}</td>"
        f"<td>{1000 * entry['seconds_per_image']['generator']:.2f}</td>"
        f"<td>{1000 * entry['seconds_per_image']['decoding_alone']:.2f}</td><td>{entry['speedup']:.1f}</td></tr>"
        for entry in sorted(numbers["speed"], key=lambda entry: entry["batch"])
    )
    spent = ", ".join(f"{name} {value:.0f}" for name, value in numbers["seconds"].items())
    config = (run / "config.yaml").read_text()
    versions = json.loads((run / "versions.json").read_text())
    explained = "".join(f"<li><b>{html.escape(k)}.</b> {html.escape(v)}</li>" for k, v in EXPLAINED.items())
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dd2: {html.escape(run.name)}</title>
<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>One-step generator: {html.escape(run.name)}</h1>
<p>A frozen autoregressive teacher was distilled by Distilled Decoding 2 (arXiv 2510.21003). Stage 1 turned a copy of it into
an AR-diffusion model on the teacher's own samples; stage 2 trained a generator, which draws all tokens in one forward pass, until
a guidance network's conditional score of its output agreed with the teacher's at every position. No images were used in either
stage.</p>
<p><b>Gap closed: {numbers["gap_closed"]:.3f}</b> of the way from independent tokens (0) to the teacher itself (1).
<b>{numbers["speedup_vs_teacher"]:.1f} times faster</b> than the KV-cached teacher at batch {numbers["speedup_batch"]}, decoding
included.</p>
<h2>Samples</h2><p class="note">The same labels in the same places.</p>
<img alt="samples of all methods" src="{_inline(samples)}">
<h2>Numbers</h2>{_table(numbers)}
<p class="note">Fréchet distance: between Gaussians fitted to features ({html.escape(numbers["features"])})
of {numbers["count"]:,} samples of each method and of the reference
({html.escape(str(numbers["evaluation"]["reference"]["reference"]))}); with the teacher as reference, its own row is the floor:
{numbers["count"]:,} other samples of its own. Teacher NLL: nats per image that the teacher assigns to the (nearest-code)
sequences: lower than the teacher's own means less varied, higher means less plausible. Distinct: different token sequences
among them. ±: half the width of the 95 % interval for other samples of the same method.</p>{_decides(numbers)}
<h2>Speed</h2><table><tr><th>batch</th><th>teacher, ms/image</th><th>generator, ms/image</th><th>of which decoding</th>
<th>ratio</th></tr>{speeds}</table>
<p class="note">Whole images, both in turns in one process; medians. At large batches arithmetic decides, of which one pass has
hardly less than all cached steps; at small ones the teacher waits for every token.</p>
<p>Seconds of this run: {spent}; threads: {versions["threads"]}.</p>
<h2>Curves</h2><img alt="training curves" src="{_inline(plotted)}"><ul>{explained}</ul>
<h2>How it was made</h2><pre>{html.escape(config)}</pre><pre>{html.escape(json.dumps(versions, indent=2))}</pre>
</body></html>
"""


def _table(numbers: dict[str, Any]) -> str:
    columns = {
        "frechet": ("Fréchet distance", ".2f"),
        "sfid": ("sFID", ".2f"),
        "kid": ("KID", ".4g"),
        "inception_score": ("IS", ".2f"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
        "density": ("density", ".3f"),
        "coverage": ("coverage", ".3f"),
        "teacher_nll": ("teacher NLL", ".1f"),
        "accuracy": ("accuracy", ".3f"),
    }
    found = numbers["metrics"]
    used = {key: column for key, column in columns.items() if any(key in values for values in found.values())}
    head = "".join(f"<th>{name}</th>" for name, _ in used.values())
    few = [name for name in found if few_steps_of(name)]
    body = ""
    for name in (*TITLES, *few):
        if name in found:
            row = "".join(f"<td>{_with_interval(found[name], key, kind)}</td>" for key, (_, kind) in used.items())
            distinct = numbers["distinct_sequences"][name]
            body += f"<tr{' class=best' if name == 'generator' else ''}><td>{title(name)}</td>{row}<td>{distinct:,}</td></tr>"
    return f"<table><tr><th>method</th>{head}<th>distinct</th></tr>{body}</table>"


def _with_interval(values: dict[str, float], key: str, kind: str) -> str:
    if key not in values:
        return "–"
    half_width = values.get(f"{key}_95")
    return format(values[key], kind) + (f"<small> ±{format(half_width, kind)}</small>" if half_width is not None else "")


def _decides(numbers: dict[str, Any]) -> str:
    """What could make the numbers differ from somebody else's."""
    rows = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in numbers["evaluation"].items()
    )
    said = "".join(f"<p><b>Warning:</b> {html.escape(text)}</p>" for text in numbers["warnings"])
    return f"{said}<details><summary>What decides these numbers</summary><table>{rows}</table></details>"


def _inline(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
