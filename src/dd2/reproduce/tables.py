"""The paper's tables: their rows, what the paper found, and what counts as finding it again."""

from collections.abc import Callable
from typing import Any

from dd2.errors import InputError
from dd2.evaluation.methods import few_steps, skip
from dd2.reproduce.benches import Bench
from dd2.reproduce.rows import USUAL, Claim, Row, Table, aligned, best, dd1, dd2
from dd2.reproduce.workshop import Cell, Changes


def open_table(name: str, bench: Bench) -> Table:
    """A table by name on a bench.

    Raises:
        InputError: there is no such table.
    """
    if name not in TABLES:
        raise InputError(f"there is no table {name}; the tables are {', '.join(TABLES)}, and all")
    return TABLES[name](bench)


BEYOND = "DD2, this library's recipe"
"""Beyond the paper: networks over codes, from the teacher's ODE (docs/method.md)."""

DD1_SPLIT = "DD1, second half by the continuous head"
"""The published split of VAR-d16 and LlamaGen-L; the benches' own is what proved better there."""


def _methods(bench: Bench) -> Table:
    skips = [
        Row(f"teacher, skip-{m}", skip(m), dd2(), "VAR skip-2 40.09 / 56.8" if m == 2 else "", bench.ar_steps - m)
        for m in bench.skips
    ]
    rows = [
        Row("teacher", "teacher", dd2(), "VAR-d16 4.15 / 278.7, LlamaGen-L 4.11 / 283.5", bench.ar_steps),
        *skips,
        Row("onestep*", "onestep_marginal", dd2(), "157.5 (VAR), 220.2 (LlamaGen)"),
        Row("DD1", "generator", dd1(), "9.94 / 193.6 (d16), 11.35 / 193.6 (L)"),
        Row(DD1_SPLIT, "generator", dd1(("heads.logits_steps", bench.ar_steps // 2))),
        Row("DD2", "generator", dd2(), "6.21 / 213.0 (d16), 8.59 / 229.1 (L)"),
        Row(BEYOND, "generator", best()),
    ]
    claims = [
        Claim("DD2 with this library's recipe is better than DD1, in no more time", BEYOND, "DD1", at_most=1.0),
        Claim("DD2 is better than DD1, at no more than half of its training time", "DD2", "DD1", at_most=0.5),
        Claim("DD2 is better than DD1 with its published split, at no more than half of its time", "DD2", DD1_SPLIT, at_most=0.5),
        Claim("DD2 is better than independent tokens", "DD2", "onestep*"),
    ]
    columns = ("frechet", "gap", "inception_score", "precision", "recall", "teacher_nll", "accuracy", "milliseconds")
    note = "The paper's column is FID / IS."
    return Table("Table 1: methods in one step", "FID, IS", rows, columns, claims, {"skip": bench.skips}, note)


def _few_steps(bench: Bench) -> Table:
    numbers = {2: "", 3: "5.24 (DD1 6.54)", 4: "4.88 (DD1 5.47)", 6: "4.47 (DD1 5.03)"}
    twice = dd1(("heads.second_step", bench.ar_steps // 2))
    rows = [Row("DD1, two passes of its own", "generator_two_passes", twice, "7.82 (d16)", 2)]
    for name, cell in (("DD1", dd1()), ("DD2", dd2()), (BEYOND, best())):
        for k in bench.steps:
            method = "generator" if k == 1 else few_steps(k)
            rows.append(
                Row(f"{name}, {k} step{'s' if k > 1 else ''}", method, cell, numbers.get(k, "") if name == "DD2" else "", k)
            )
    most = bench.steps[-1]
    claims = [
        Claim("more steps with the teacher are better", f"DD2, {most} steps", "DD2, 1 step"),
        Claim(
            "DD2 is better than DD1 at the same number of steps", f"DD2, {bench.steps[1]} steps", f"DD1, {bench.steps[1]} steps"
        ),
    ]
    paper = "FID of VAR-d16 with 3, 4 and 6 steps"
    return Table("Table 2: few steps with the teacher (Alg. 4)", paper, rows, USUAL, claims, {"steps": bench.steps})


def _time(bench: Bench) -> Table:
    rows = [
        Row("DD1", "generator", dd1(), "296.9 (d16), 647.7 (LlamaGen-L)"),
        Row("DD2", "generator", dd2(), "115.5 (d16), 52.6 (LlamaGen-L)"),
        Row(BEYOND, "generator", best()),
    ]
    claims = [
        Claim("DD2 with this library's recipe is better than DD1, in no more time", BEYOND, "DD1", at_most=1.0),
        Claim(
            "DD2 with this library's recipe has the smaller distance, in no more time",
            BEYOND,
            "DD1",
            "frechet",
            higher=False,
            at_most=1.0,
        ),
        Claim("DD2 is better than DD1, at no more than half of its training time", "DD2", "DD1", at_most=0.5),
    ]
    note = "Seconds of everything a method needs beyond the teacher: samples or pairs, and all training."
    return Table("Table 3: training time", "hours on 8 A800", rows, ("seconds", *USUAL), claims, note=note)


def _initialisation(bench: Bench) -> Table:
    rows = [
        Row("both from stage 1", "generator", dd2(), "14.77 (LlamaGen-L), 11.53 (d24)"),
        Row("guidance alone", "generator", dd2(("csd.initialised", "guidance")), "16.08, collapse"),
        Row("generator alone", "generator", dd2(("csd.initialised", "generator")), "21.76, collapse"),
        Row("neither", "generator", dd2(("csd.initialised", "neither"))),
        Row("random weights", "generator", dd2(("csd.initialised", "random"))),
    ]
    claims = [
        Claim("initialising both is better than the guidance network alone", "both from stage 1", "guidance alone"),
        Claim("initialising both is better than the generator alone", "both from stage 1", "generator alone"),
    ]
    note = (
        "A network that is not initialised starts where stage 1 did, as the teacher's layers under a randomly initialised head "
        "(Sec. 5.5). The paper has no rows for neither, and for networks without anything of the teacher's."
    )
    return Table("Table 4: initialisation from stage 1", "FID-5k", rows, USUAL, claims, note=note, curves=True)


def _path_length(bench: Bench) -> Table:
    rows = [
        Row("DD1, all tokens classified", "generator", dd1(("heads.logits_steps", bench.ar_steps))),
        Row(DD1_SPLIT, "generator", dd1(("heads.logits_steps", bench.ar_steps // 2)), "18437.6"),
        Row("DD2", "generator", dd2(), "7231.9"),
        Row("DD2, nearest codes", "generator_nearest", dd2()),
    ]
    claims = [Claim("DD2's latent space is smoother", "DD2", DD1_SPLIT, column="path_length", higher=False)]
    note = (
        "In the features of the metrics; the paper does not give its settings, so the scales differ. ε = 1e-4. Where every token "
        "is a code, images are constant between jumps, which paths this short hardly meet: a 0 says nothing of smoothness."
    )
    columns = ("path_length", "frechet", "gap")
    return Table("Table 5: perceptual path length", "PPL", rows, columns, claims, {"path_length": 1000}, note)


def _stage1_loss(bench: Bench) -> Table:
    def stage1(*changes: tuple[str, Any]) -> Callable[[int], Cell]:
        return lambda seed: Cell("stage1", seed, changes)

    rows = [
        Row("GTS (Eq. 6)", "ar_diffusion", stage1(), "11.41 (330k iterations)", bench.ar_steps),
        Row("plain diffusion", "ar_diffusion", stage1(("tune.loss", "diffusion")), "17.98 (500k iterations)", bench.ar_steps),
    ]
    claims = [Claim("the teacher's closed-form score is the better target", "GTS (Eq. 6)", "plain diffusion")]
    note = "The AR-diffusion model of stage 1, sampled step by step; equal iterations."
    return Table("Table 7: loss of stage 1", "FID-5k of VAR-d16", rows, USUAL, claims, note=note)


def _alignment(bench: Bench) -> Table:
    further = bench.paper.csd.iterations
    align: Changes = (
        ("align.iterations", max(1, further // 5)),
        ("align.then_iterations", max(1, further // 3)),
        ("align.then_k", bench.paper.csd.k),
        ("align.then_lr", 0.5),
    )
    rows = [
        Row("before", "generator", dd2(), "8.35 (d16), 6.57 (d20)"),
        Row("after alignment and further training", "generator", aligned(align), "6.21 (d16), 5.43 (d20)"),
    ]
    claims = [Claim("alignment and what follows it help", "after alignment and further training", "before")]
    note = "The second row has trained longer, as in the paper: a fifth of stage 2 in alignment, a third after it."
    return Table("Table 9: performance alignment", "FID", rows, (*USUAL, "seconds"), claims, note=note)


def _k(bench: Bench) -> Table:
    rows = [Row(f"K = {k}", "generator", dd2(("csd.k", k))) for k in (1, 2, 3, 5)]
    claims = [Claim("more guidance updates per generator update help", "K = 5", "K = 1")]
    note = "Equal generator updates, so unequal time: see the seconds."
    return Table(
        "K: guidance updates per generator update (App. C.4)", "", rows, (*USUAL, "seconds"), claims, note=note, curves=True
    )


def _distance(bench: Bench) -> Table:
    rows = [
        Row("SiD, α = 1.0", "generator", dd2(("csd.d", "sid"), ("csd.alpha", 1.0)), "the paper's choice"),
        Row("SiD, α = 1.2", "generator", dd2(("csd.d", "sid"), ("csd.alpha", 1.2))),
        Row("SIM", "generator", dd2(("csd.d", "sim"))),
        Row("DMD", "generator", dd2(("csd.d", "dmd"))),
    ]
    claims = [Claim("SiD is better than DMD", "SiD, α = 1.0", "DMD")]
    note = "Equal iterations, which is nearly equal time. The rates of the bench were chosen with DMD."
    return Table("Loss: the distance of Eq. 4", "Sec. 3.2.2", rows, (*USUAL, "seconds"), claims, note=note)


def _latency(bench: Bench) -> Table:
    rows = [Row("teacher", "teacher", dd2(), steps=bench.ar_steps)]
    rows += [Row(f"teacher, skip-{m}", skip(m), dd2(), steps=bench.ar_steps - m) for m in bench.skips]
    for name, cell in (("DD1", dd1()), ("DD2", dd2()), (BEYOND, best())):
        rows += [Row(f"{name}, {k} passes", "generator" if k == 1 else few_steps(k), cell, steps=k) for k in bench.steps]
    claims = [Claim("this library's recipe is better in one pass than DD1", f"{BEYOND}, 1 passes", "DD1, 1 passes")]
    note = "Milliseconds an image at batch 16, decoding included; all methods of a run take turns in one process."
    wanted = {"steps": bench.steps, "skip": bench.skips}
    return Table("Quality against latency", "", rows, ("milliseconds", *USUAL), claims, wanted, note)


def _recipe(bench: Bench) -> Table:
    codes, pairs_alone = ("networks.guidance", "codes"), ("regress.own_share", 0.0)
    rows = [
        Row("the paper's recipe", "generator", dd2()),
        Row("the paper's full-size settings", "generator", dd2(*FULL_SIZE)),
        Row("guidance over codes", "generator", dd2(codes)),
        Row(BEYOND, "generator", best()),
        Row("no stage 2", "generator", best(("csd.iterations", 0))),
        Row("pairs alone", "generator", best(pairs_alone)),
        Row("own tokens alone", "generator", best(("regress.own_share", 1.0))),
        Row("no regression in stage 2", "generator", best(("csd.regression_weight", 0.0))),
        Row("4 layers more", "generator", best(("networks.extra_layers", 4))),
        Row("no sequences matched", "generator", best(("csd.match.weight", 0.0))),
        Row("SiD", "generator", best(("csd.d", "sid"))),
        Row("SIM", "generator", best(("csd.d", "sim"))),
    ]
    claims = [Claim("this library's recipe is better than the paper's", BEYOND, "the paper's recipe")]
    note = (
        "Rows below this library's recipe change one thing of it. The full-size settings are those of "
        "configs/llamagen_l_paper.yaml: SiD, t from 0.02, weight floor 0.01, one draw, no snapping, K = 5. Equal iterations, not "
        "equal time: see the seconds."
    )
    return Table("Recipe: what goes beyond the paper", "", rows, (*USUAL, "seconds"), claims, note=note)


FULL_SIZE: Changes = (
    ("csd.d", "sid"),
    ("csd.noise_level.low", 0.02),
    ("csd.weight_floor", 0.01),
    ("csd.generator_draws", 1),
    ("csd.guidance_draws", 4),
    ("csd.snap_teacher", False),
    ("csd.k", 5),
)

TABLES: dict[str, Callable[[Bench], Table]] = {
    "1": _methods,
    "2": _few_steps,
    "3": _time,
    "4": _initialisation,
    "5": _path_length,
    "7": _stage1_loss,
    "9": _alignment,
    "k": _k,
    "loss": _distance,
    "latency": _latency,
    "recipe": _recipe,
}
