"""The model card of a package: README.md with the metadata that the Hub reads."""

import html
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dd2 import __version__
from dd2.errors import InputError
from dd2.evaluation.columns import COLUMNS
from dd2.evaluation.report import METRICS
from dd2.evaluation.summary import SHOWN, described
from dd2.generator import Generator
from dd2.records import read_record
from dd2.teachers.conditions import CaptionLabels, ClassLabels

ARXIV = "2510.21003"

LICENCES = frozenset(
    (
        *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "unlicense", "other", "unknown"),
        *("openrail", "bigscience-openrail-m", "creativeml-openrail-m", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0"),
        *("cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    )
)
"""Short names that the Hub knows, as far as they are likely here; "other" for all else."""

NAME = re.compile(r"[\w.-]+/[\w.-]+")

CALLED = {"frechet": "frechet_distance", "precision": "precision", "recall": "recall", "accuracy": "accuracy"}
"""Columns of metrics.json, and what the card's metadata calls them; fid only where the features are Inception's."""


@dataclass(frozen=True)
class Card:
    """What people should know of a model.

    Attributes:
        name: its name, or "owner/name".
        license: a short name of the Hub's, or empty: nobody said.
        base_model: "owner/name" of the teacher on the Hub, or empty.
        datasets: that the teacher was trained on, by their names on the Hub.
        teacher: what it was distilled from, in words.
        sampling: the teacher's distribution that was distilled.
        numbers: metrics.json of its evaluation, or None.
        made: versions.json of its run.
        changed: what is not as its run ended with it.
    """

    name: str = "one-step generator"
    license: str = ""
    base_model: str = ""
    datasets: tuple[str, ...] = ()
    teacher: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    changed: str = ""

    def __post_init__(self) -> None:
        """Refuse what the Hub would."""
        if self.license and self.license not in LICENCES:
            raise InputError(f"license {self.license} is no short name of the Hub's, such as mit, cc-by-nc-4.0 or other")
        for field_name, names in (("base_model", [self.base_model] if self.base_model else []), ("datasets", self.datasets)):
            if wrong := [name for name in names if not NAME.fullmatch(name)]:
                raise InputError(f"{field_name} must be named owner/name, as on the Hub, got {wrong[0]!r}")


def measured(run: Path) -> dict[str, Any] | None:
    """metrics.json of a run, where it was evaluated.

    Raises:
        InputError: it is damaged.
    """
    file = run / "metrics.json"
    return read_record(file, METRICS, "make it again by dd2 evaluate") if file.is_file() else None


def card_text(card: Card, generator: Generator, *, has_teacher: bool, has_picture: bool) -> str:
    """README.md of a package."""
    parts = [
        f"---\n{yaml.safe_dump(metadata(card, generator), sort_keys=False, allow_unicode=True)}---",
        f"# {card.name.split('/')[-1]}",
        _about(card, generator),
        *(["![One image per label, in one step](samples.png)"] if has_picture else []),
        _use(card, generator, has_teacher),
        *([_results(card.numbers)] if card.numbers else []),
        _limits(card, generator),
        "## How to cite\n\nDistilled Decoding 2: One-step Sampling of Image Auto-regressive Models with Conditional Score "
        f"Distillation, NeurIPS 2025, [arXiv:{ARXIV}](https://arxiv.org/abs/{ARXIV}). "
        "Distilled with dd2, an independent implementation.",
    ]
    return "\n\n".join(parts) + "\n"


def metadata(card: Card, generator: Generator) -> dict[str, Any]:
    """The YAML at the head of a card."""
    by_text = not isinstance(generator.conditions, ClassLabels)
    found: dict[str, Any] = {"license": card.license} if card.license else {}
    found |= {
        "library_name": "dd2",
        "pipeline_tag": "text-to-image" if by_text else "unconditional-image-generation",
        "tags": ["one-step", "distillation", "autoregressive", "image-generation", f"arxiv:{ARXIV}"],
    }
    if card.base_model:
        found |= {"base_model": card.base_model, "base_model_relation": "finetune"}
    if card.datasets:
        found["datasets"] = list(card.datasets)
    if card.numbers:
        entries = _entries(card.numbers)
        found["metrics"] = [entry["type"] for entry in entries]
        reference = str(card.numbers["evaluation"]["reference"].get("reference", "teacher"))
        dataset = {"type": "generated" if reference == "teacher" else "images", "name": _of_reference(reference)}
        task = {"type": found["pipeline_tag"]}
        found["model-index"] = [
            {"name": card.name.split("/")[-1], "results": [{"task": task, "dataset": dataset, "metrics": entries}]}
        ]
    return found


def _entries(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of the generator as the metadata has them, with what decides them."""
    own, inception = numbers["metrics"]["generator"], "inception" in str(numbers["features"]).lower()
    settings = {"images": numbers["count"], "features": numbers["features"], "steps": 1}
    found = []
    for key, called in CALLED.items():
        value = own.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            kind = "fid" if key == "frechet" and inception else called
            entry = {"type": kind, "value": round(float(value), 4), "name": COLUMNS[key].heading}
            found.append(entry | {"args": dict(settings)})  # a copy: YAML would refer to the first
    return found


def _of_reference(reference: str) -> str:
    return "other images of the teacher's own" if reference == "teacher" else Path(reference).name


def _about(card: Card, generator: Generator) -> str:
    channels, height, width = generator.tokenizer.image_shape
    colour = "grey" if channels == 1 else "colour"
    labels = generator.conditions
    of = f"{labels.num_classes:,} classes" if isinstance(labels, ClassLabels) else "captions"
    n = generator.student.backbone.order.n
    said = [
        f"Draws {width} × {height} px {colour} images of {of} in **one** forward pass, where its teacher, an autoregressive "
        f"model, takes {generator.student.backbone.order.num_steps} for the same {n} tokens."
    ]
    if card.teacher:
        said.append(f"Distilled from {card.teacher}, without its training data.")
    if card.sampling:
        said.append(
            "The teacher's distribution that it learned: " + ", ".join(f"{k} {v}" for k, v in card.sampling.items()) + "."
        )
    return " ".join(said)


def _use(card: Card, generator: Generator, has_teacher: bool) -> str:
    conditions = generator.conditions
    by_text = isinstance(conditions, CaptionLabels)
    names = () if by_text else conditions.class_names
    first, second = _texts(conditions) if by_text else ("0", _example(generator))
    asked = f"--prompt {first}" if by_text else "--count 64"
    where = card.name if NAME.fullmatch(card.name) else "FOLDER"
    module = generator.code.partition(":")[0]
    trust, flag = (f', trust=["{module}"]', f" --trust {module}") if module else ("", "")
    lines = [
        "## Use",
        "",
        f'```sh\npip install "dd2[hub{",t2i" if by_text else ""}]"\n```',
        "",
        "```python",
        "from dd2 import OneStepPipeline",
        "",
        f'pipe = OneStepPipeline.from_pretrained("{where}"{trust})',
        f"images = pipe(labels=[{first}, {second}], seeds=[0, 1]).images",
        *(
            [f"better = pipe(labels=[{first}], seeds=[0], num_inference_steps=4).images  # the teacher redraws the end"]
            * has_teacher
        ),
        "```",
        "",
        f"`dd2 sample {where}{flag} {asked}`"
        + (f", `dd2 serve {where}{flag}` for a page in the browser" if has_teacher else "")
        + ".",
    ]
    if module:
        lines += ["", f"It needs the Python module `{module}`, which is not part of it, and which you have to trust by name."]
    if by_text and conditions.encoder is not None:
        lines += ["", f"Prompts are read by the text encoder {_plain(conditions.encoder.said())}; longer ones are cut."]
    if names:
        shown = ", ".join(map(_plain, names[:12])) + (f" … ({len(names):,} in all)" if len(names) > 12 else "")
        lines += ["", f"Labels: {shown}."]
    return "\n".join(lines)


def _results(numbers: dict[str, Any]) -> str:
    shown = [key for key in SHOWN if any(key in row for row in numbers["metrics"].values())]
    lines = [
        "## Results",
        "",
        f"| | {' | '.join(COLUMNS[key].heading for key in shown)} |",
        "|---|" + "---:|" * len(shown),
    ]
    for name, title in numbers["methods"].items():
        cells = [_cell(numbers["metrics"][name], key) for key in shown]
        lines.append(f"| {_plain(title)} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Share of the gap between independent tokens and the teacher that is closed: {numbers['gap_closed']:.3f}.",
        "",
        "What decides these numbers:",
        "",
        *(f"- {_elsewhere(line)}" for line in described(numbers, names_alone=True).splitlines()),
    ]
    return "\n".join(lines)


def _texts(conditions: CaptionLabels) -> tuple[str, str]:
    """Two prompts for the example, as code has them."""
    try:
        known = conditions.class_names
    except InputError:  # the run's own captions are elsewhere
        known = ()
    plain = [text for text in known if re.fullmatch(r"[A-Za-z0-9 ,.']{1,50}", text)]
    return tuple(f'"{text}"' for text in [*plain, "a red fox", "snow at night"][:2])  # pyright: ignore[reportReturnType]


def _example(generator: Generator) -> str:
    """A label for the example, by its name where that is no number and fits on a line of code."""
    names = generator.conditions.class_names
    if len(names) < 2 or not names[1].isprintable() or len(names[1]) > 40:
        return str(min(1, generator.conditions.num_labels - 1)) if isinstance(generator.conditions, ClassLabels) else "0"
    try:
        known = generator.conditions.label(names[1]) == 1
    except InputError:
        known = False
    return repr(names[1]) if known else "1"


def _plain(text: str) -> str:
    """Text that somebody chose, as Markdown that shows it and does nothing else."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return html.escape(re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", line), quote=False)


def _elsewhere(line: str) -> str:
    """The same without folders of this machine: the names of files alone."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s/,;]+/)+([^\s/,;]+)", r"\1", line)


def _cell(row: dict[str, Any], key: str) -> str:
    if not isinstance(row.get(key), int | float):
        return ""
    half = row.get(f"{key}_95")
    kind = COLUMNS[key].kind
    return format(row[key], kind) + (f" ± {format(half, kind)}" if isinstance(half, int | float) else "")


def _limits(card: Card, generator: Generator) -> str:
    guidance = card.sampling.get("cfg_scale")
    lines = [
        "## Limits",
        "",
        "- What the teacher cannot draw, this cannot either; and it is somewhat worse (see Results, if it was measured).",
        "- Guidance and temperature were decided when it was distilled"
        + (f" (cfg_scale {guidance})" if guidance is not None else "")
        + "; they cannot be changed in one step.",
        "- The same seed and label give the same image on one machine, up to rounding on another.",
    ]
    if not card.license:
        lines.append("- Nobody has said under which licence it is. That of the teacher's weights and of its data bind.")
    if (aligned := generator.tokenizer.aligned) is not None:
        lines.append(f"- Its decoder is not the teacher's: {_elsewhere(str(aligned))}.")
    if card.changed:
        lines.append(f"- Not as its run was evaluated: {card.changed}.")
    commit = card.made.get("commit", "unknown")
    lines.append(f"- Made with dd2 {__version__}, commit {commit}.")
    return "\n".join(lines)
