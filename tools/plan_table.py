"""Fill the table of docs/memory-and-time.md: python tools/plan_table.py (a minute; nothing is computed)."""

from pathlib import Path

from marked import put

from dd2.checkpoints.released import sketch
from dd2.commands.needs import needs
from dd2.commands.plan_config import GB, PlanConfig
from dd2.config import load_config

PAGE = Path("docs/memory-and-time.md")
MODELS = (
    *("var_d16", "var_d20", "var_d24", "var_d30", "var_d36_512"),
    *("llamagen_b", "llamagen_l", "llamagen_xl_384", "llamagen_t2i_xl", "llamagen_t2i_xl_512", "mar_b", "mar_l", "mar_h"),
)
PAPER = ("var_d16_paper", "var_d20_paper", "var_d24_paper", "llamagen_l_paper")
GPUS = 8


def main() -> None:
    """Plan every configuration and rewrite the table."""
    lines = [
        "| configuration | teacher | memory of a GPU | s an iteration | iterations | stage 2, GPU hours "
        "| regression, GPU hours |",
        "|---" + "|---:" * 6 + "|",
    ]
    for name in (*MODELS, *PAPER):
        model = name.removesuffix("_paper")
        config = load_config(PlanConfig, name, ["--model", model, "--gpus", str(GPUS)])
        found = needs(config, sketch(model))
        assert found.fits(config.bytes_per_gpu), f"{name} does not fit: {found.total / GB:.0f} GB"
        iterations = config.csd.iterations + config.align.then_iterations
        hours = GPUS * found.seconds * iterations / 3600
        start = f"{GPUS * found.start_seconds / 3600:,.0f}" if found.start else ""
        lines.append(
            f"| `{name}` ({config.loop.parallel}) | {found.parameters['teacher'] / 1e6:,.0f} M | {found.total / GB:.0f} GB | "
            f"{found.seconds:.1f} | {iterations:,} | {hours:,.0f} | {start} |"
        )
    put(PAGE, "plans", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
