"""How good the generator was at every checkpoint of a digits run: EMA and raw weights.

    dd2 distill configs/digits_long.yaml --loop.keep 30
    python benchmarks/digits_curve.py runs/digits_long [--count 5000]

Writes docs/results/digits_long_curve.json and .png, and the table in docs/results/digits.md. "Validation" is what training
measured itself (csd.validation). Distances at other counts are not comparable: fewer samples raise the floor.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file

from dd2.checkpoints.runs import open_run
from dd2.commands.evaluate import comparison, ways_of
from dd2.evaluation.config import EvaluateConfig
from dd2.evaluation.features import open_features
from dd2.evaluation.methods import Method
from dd2.files import weights_digest
from dd2.frechet import fit_gaussian, frechet_distance
from dd2.training.checkpoint import STATE_FILE, steps
from dd2.training.metrics import MetricsLog

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def main() -> None:
    """Measure every checkpoint and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    arguments = parser.parse_args()
    cpu = torch.device("cpu")
    run = open_run(arguments.run, cpu)
    config = EvaluateConfig(run=arguments.run, count=arguments.count)
    scorer, methods = comparison(config, run, ways_of(run, config), open_features(config.features, cpu))
    reference = scorer.teacher_reference(methods["teacher"])
    student = run.generator.student

    def measure(title: str, name: str, method: Method) -> dict[str, float]:
        bank = scorer.bank(title, name, method, "floor" if method.floor else "methods")
        right = bank.load("probabilities").argmax(1) == bank.load("labels")
        return {
            "frechet": frechet_distance(fit_gaussian(bank.stream("pool")), reference.fits["pool"]),
            "nll": float(bank.load("nll").double().mean()),
            "accuracy": float(right.double().mean()),
        }

    teacher, marginal = (measure(name, name, methods[name]) for name in ("teacher", "onestep_marginal"))
    floor, worst = teacher["frechet"], marginal["frechet"]
    folder = arguments.run / "checkpoints" / "csd"
    seconds = {row["step"]: row["seconds"] for row in MetricsLog(arguments.run / "metrics.jsonl").rows() if row["stage"] == "csd"}
    rows = []
    lines = [
        "| step | minutes | FD, EMA | gap closed | NLL | accuracy | validation | FD, raw weights |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for step in steps(folder):
        found = {}
        for name in ("generator", "generator_ema"):
            student.load_state_dict(load_file(folder / f"{step:08d}" / f"{name}.safetensors"))
            loaded = replace(methods["generator"], decides={"weights": weights_digest(student)})
            found[name] = measure(f"{step} {name}", "generator", loaded)
        ema = found["generator_ema"]
        row = {
            "step": step,
            "minutes": seconds[step] / 60,
            "frechet_ema": ema["frechet"],
            "frechet_raw": found["generator"]["frechet"],
            "teacher_nll": ema["nll"],
            "accuracy": ema["accuracy"],
            "validation": json.loads((folder / f"{step:08d}" / STATE_FILE).read_text())["validation"],
        }
        row["gap_closed"] = (worst - row["frechet_ema"]) / (worst - floor)
        rows.append(row)
        lines.append(
            f"| {step} | {row['minutes']:.1f} | {row['frechet_ema']:.2f} | {row['gap_closed']:.3f} | {row['teacher_nll']:.1f} "
            f"| {row['accuracy']:.3f} | {row['validation']:.4f} | {row['frechet_raw']:.2f} |"
        )
        print(lines[-1], flush=True)
    baselines = {"floor": floor, "onestep_marginal": worst, "teacher_nll": teacher["nll"]}
    result = {"count": arguments.count, **baselines, "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "digits_long_curve.json").write_text(json.dumps(result, indent=2) + "\n")
    page = RESULTS / "digits.md"
    marked = re.compile(r"(<!-- digits_long_curve -->\n).*?(<!-- /digits_long_curve -->)", re.DOTALL)
    page.write_text(marked.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], page.read_text()))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("frechet_ema", "generator, EMA"), ("frechet_raw", "generator, raw weights")):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], marker="o", label=label)
    axes.axhline(floor, color="0.5", linestyle="--", label="teacher against itself (floor)")
    axes.axhline(worst, color="tab:red", linestyle=":", label="independent tokens (onestep*)")
    axes.set(xlabel="generator steps", ylabel="Fréchet distance", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(RESULTS / "digits_long_curve.png"))


if __name__ == "__main__":
    main()
