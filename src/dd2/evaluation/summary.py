"""The numbers of an evaluation for the terminal."""

from typing import Any

from dd2.evaluation.score import few_steps


def summary(numbers: dict[str, Any]) -> str:
    """The few numbers that matter, as a table for the terminal, and what decides them."""
    lines = ["", f"{'':24}{'Fréchet':>9}{'95 %':>8}{'prec.':>8}{'recall':>8}{'teacher NLL':>13}{'accuracy':>10}"]
    rows = {
        "teacher": "teacher (floor)" if numbers["evaluation"]["reference"].get("reference") == "teacher" else "teacher",
        "ar_diffusion": "AR-diffusion",
        "generator": "generator",
        "generator_nearest": "generator, nearest",
        "generator_two_passes": "generator, two passes",
        **{few_steps(k): f"with the teacher, {k} steps" for k in numbers["evaluation"]["steps"] if k > 1},
        **{f"teacher_skip_{m}": f"teacher, skip-{m}" for m in numbers["evaluation"]["skip"]},
        "onestep_marginal": "onestep* (independent)",
    }
    for name, title in rows.items():
        if name in numbers["metrics"]:
            found = numbers["metrics"][name]
            cells = [("frechet", 9, 2), ("frechet_95", 8, 2), ("precision", 8, 3), ("recall", 8, 3), ("teacher_nll", 13, 1)]
            cells.append(("accuracy", 10, 3))
            shown = "".join(f"{found[key]:{width}.{digits}f}" if key in found else " " * width for key, width, digits in cells)
            lines.append(f"{title:24}{shown}")
    lines.append(f"gap closed {numbers['gap_closed']:.3f}")
    if "speed" in numbers:
        lines[-1] += f", {numbers['speedup_vs_teacher']:.1f} times faster than the teacher (batch {numbers['speedup_batch']})"
    lines.append(described(numbers))
    lines.append("")
    return "\n".join(lines)


def described(numbers: dict[str, Any]) -> str:
    """What decides the numbers, and what to beware of."""
    reference = numbers["evaluation"]["reference"]
    digest = f", SHA-256 {reference['sha256'][:12]}" if "sha256" in reference else ""
    count = f", {reference['count']:,} images" if "count" in reference else ""
    features = f"{numbers['features']}, hash {numbers['features_digest'][:12]}"
    lines = [f"{numbers['count']:,} images against {reference['reference']}{count}{digest}; features: {features}"]
    decides = numbers["evaluation"]
    if "sampling" in decides:
        shown = ", ".join(f"{key} {value}" for key, value in decides["sampling"].items())
        balance = f"{decides['images_per_label']:g} images per label; seeds: {decides['seeds']}"
        lines.append(f"{balance}; {decides['rounding']}; teacher: {shown}")
    return "\n".join([*lines, *(f"warning: {text}" for text in numbers["warnings"])])
