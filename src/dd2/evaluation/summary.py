"""The numbers of an evaluation for the terminal."""

from pathlib import Path
from typing import Any

from dd2.evaluation.clip import CLIP_SCORES
from dd2.evaluation.columns import COLUMNS

OWN_DECODER = "the tokenizer's own"
"""What decoded the images, where it was not trained further."""

SHOWN = ("frechet", "precision", "recall", "teacher_nll", "accuracy", "agreement", *CLIP_SCORES)
"""The columns of the terminal's table."""


def summary(numbers: dict[str, Any]) -> str:
    """The few numbers that matter, as a table for the terminal, and what decides them."""
    titles = dict(numbers["methods"])
    if numbers["evaluation"]["reference"].get("reference") == "teacher":
        titles["teacher"] += " (floor)"
    used = [key for key in SHOWN if any(key in found for found in numbers["metrics"].values())]
    first = max(map(len, titles.values())) + 2
    lines = ["", " " * first + "".join(f"{COLUMNS[key].heading:>18}" for key in used)]
    for name, title in titles.items():
        lines.append(f"{title:{first}}" + "".join(f"{_cell(numbers['metrics'][name], key):>18}" for key in used))
    lines.append(f"gap closed {numbers['gap_closed']:.3f}")
    if "speed" in numbers:
        lines[-1] += f", {numbers['speedup_vs_teacher']:.1f} times faster than the teacher (batch {numbers['speedup_batch']})"
    lines.append(described(numbers))
    lines.append("")
    return "\n".join(lines)


def _cell(found: dict[str, float], key: str) -> str:
    """A number and half of its 95 % interval."""
    if key not in found:
        return ""
    half_width = found.get(f"{key}_95")
    return format(found[key], COLUMNS[key].kind) + (
        f" ±{format(half_width, COLUMNS[key].kind)}" if half_width is not None else ""
    )


def described(numbers: dict[str, Any], *, names_alone: bool = False) -> str:
    """What decides the numbers, and what to beware of.

    Args:
        numbers: content of metrics.json.
        names_alone: leave out where files are, for readers elsewhere.
    """
    reference = dict(numbers["evaluation"]["reference"])
    if names_alone:
        reference["reference"] = Path(reference["reference"]).name
    digest = f", SHA-256 {reference['sha256'][:12]}" if "sha256" in reference else ""
    count = f", {reference['count']:,} images" if "count" in reference else ""
    features = f"{numbers['features']}, hash {numbers['features_digest'][:12]}"
    lines = [f"{numbers['count']:,} images against {reference['reference']}{count}{digest}; features: {features}"]
    decides = numbers["evaluation"]
    if "sampling" in decides:
        shown = ", ".join(f"{key} {value}" for key, value in decides["sampling"].items())
        balance = f"{decides['images_per_label']:g} images per label; seeds: {decides['seeds']}"
        precision = decides.get("precision", "float32")
        lines.append(f"{balance}; drawn in {precision}; {decides['rounding']}; teacher: {shown}")
        lines.append(f"decoder: {decides.get('decoder') or OWN_DECODER}")
    if "prompts_sha256" in decides:
        count, digest = decides["prompts_count"], decides["prompts_sha256"][:12]
        lines.append(f"prompts: {Path(decides['prompts']).name}, {count:,} of them, SHA-256 {digest}")
    for group, methods in numbers.get("groups", {}).items():
        keys = [key for key in ("frechet", "agreement", *CLIP_SCORES) if key in methods["generator"]]
        said = (
            f"{COLUMNS[key].heading} "
            f"{' against '.join(format(methods[name][key], COLUMNS[key].kind) for name in ('generator', 'teacher'))}"
            for key in keys
        )
        lines.append(f"{group}, one step against the teacher: {', '.join(said)}")
    lines += [f"not measured: {text}" for text in numbers.get("absent", [])]
    return "\n".join([*lines, *(f"warning: {text}" for text in numbers["warnings"])])
