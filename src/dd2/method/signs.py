"""How the stages of a distillation fail, and how it shows in what they log (docs/healthy-curves.md)."""

from dd2.training.health import Below, EndsAbove, Rises, Sign, Stalls, loss_rises

BEST = "the best checkpoint is kept: dd2 export RUN OUT --step best"

TUNE = (loss_rises("student/loss"),)
"""Of stage 1."""

REGRESS = (loss_rises("generator/loss"),)
"""Of the regression before stage 2."""

VALIDATION = (
    Sign(
        "divergence",
        "validation",
        Rises(1.5, noisy=False),
        f"the generator gets worse for its teacher; lower csd.generator.lr or csd.match.weight, or raise csd.k ({BEST})",
    ),
    Sign(
        "collapse",
        "spread",
        Below(0.6),
        "sequences of one label vary so much less than the teacher's; raise csd.k, lower csd.generator.lr (or csd.alpha of sid), "
        "or let csd.sampling be no sharper than tune.sampling",
    ),
    Sign(
        "dead codes",
        "codes_used",
        Below(0.5),
        "so few are drawn of the codes that the teacher draws; what helps against collapse helps",
    ),
)
"""Of everything that is judged by the teacher's distance."""

CSD = (
    Sign(
        "divergence",
        "generator/score_difference",
        Rises(1.6),
        f"generator and teacher move apart; lower csd.generator.lr or raise csd.k ({BEST})",
    ),
    *VALIDATION,
    Sign(
        "lagging guidance",
        "guidance/loss",
        Rises(1.5),
        "the generator runs away from its guidance network; raise csd.k or csd.guidance.lr, or lower csd.generator.lr",
    ),
    Sign(
        "off-code tokens",
        "generator/to_nearest_code",
        Rises(1.8),
        "tokens leave the codes; lower csd.generator.lr, or let csd.snap_teacher and csd.noise_level be as they were given",
    ),
    Sign(
        "plateau",
        "generator/score_difference",
        Stalls(),
        "what is left to gain needs a lower rate: csd.generator.decay cosine, or fewer csd.iterations",
        rate="generator/lr",
    ),
    Sign(
        "average behind",
        "generator/ema_lag",
        EndsAbove(0.01),
        "the rate had not decayed when training ended, so that the average is of unlike weights; use csd.generator.decay cosine",
    ),
)
"""Of stage 2, in all its parts."""
