"""Training says when it has failed: each sign by hand, each failure driven on the digits, and no false alarm on healthy runs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dd2.checkpoints.runs import embedded, open_teacher
from dd2.cli import main
from dd2.evaluation.health import signs as signs_of_numbers
from dd2.frechet import fit_gaussian
from dd2.method import signs
from dd2.method.validation import TeacherDistance, within_labels
from dd2.teachers.filtering import Sampling
from dd2.training.health import Below, EndsAbove, Health, Rises, Rule, Sign, Stalls, findings, loss_rises
from dd2.training.metrics import MetricsLog
from dd2.training.samples import TeacherSamples


def noticed(rule: Rule, values: Sequence[float], total: int | None = None, rates: list[float] | None = None) -> list[int]:
    """The steps, 10 apart, at which a sign with this rule is noticed: once or never."""
    health = Health([Sign("x", "n", rule, "do", "lr")], total or 10 * len(values))
    found = []
    for index, value in enumerate(values):
        step = 10 * (index + 1)
        if health.see({"step": step, "n": value, **({} if rates is None else {"lr": rates[index]})}):
            found.append(step)
    return found


def test_a_rise_is_one_above_the_best_and_not_a_spike():
    assert noticed(Rises(1.5), [5, 4, 3, 2, 1] + [1] * 9) == []
    assert noticed(Rises(1.5), [1] * 8 + [9] * 2 + [1] * 8) == []  # two wild rows are no rise
    assert noticed(Rises(1.5), [1] * 8 + [1.6] * 6) == [110]  # the third of them decides the median of five
    assert noticed(Rises(1.5), [9] * 3 + [2] * 4 + [3.1] * 6) == [100]  # the first fall is no rise
    assert noticed(Rises(1.5, noisy=False), [3, 2, 2.9, 3.1, 9]) == [40]
    assert noticed(Rises(2), [-1, -2, -3, 4, 5, 6, 7, 8]) == []  # of what may be negative a ratio means nothing
    assert noticed(Rises(2, of_first=0.1), [1] * 5 + [0.001] * 6 + [0.09] * 6) == []
    assert noticed(Rises(2, of_first=0.1), [1] * 5 + [0.001] * 6 + [0.3] * 6) == [140]


def test_a_plateau_is_one_at_a_high_rate():
    falling = [1 / (1 + i) for i in range(15)]
    flat = falling + [falling[-1]] * 85  # the median of five reaches the best at step 170, and 300 of 1,000 steps later
    cosine = [math.cos(i / 100 * math.pi) / 2 + 0.5 for i in range(100)]
    assert noticed(Stalls(), flat, rates=[1.0] * 100) == [470]
    assert noticed(Stalls(), flat, rates=cosine) == [470]
    assert noticed(Stalls(), flat, rates=[1.0] * 30 + [0.4] * 70) == []
    assert noticed(Stalls(), [1 / (1 + i) for i in range(100)], rates=[1.0] * 100) == []
    assert noticed(Stalls(), [1.0] * 8, total=80, rates=[1.0] * 8) == []  # too few rows to say


def test_limits_count_late():
    assert noticed(Below(0.6), [0.1, 0.9, 0.9, 0.5], total=40) == [40]
    assert noticed(Below(0.6), [0.1, 0.1, 0.7, 0.7], total=40) == [20]
    assert noticed(EndsAbove(0.01), [1, 1, 1, 0.02], total=50) == []
    assert noticed(EndsAbove(0.01), [1, 1, 1, 1, 0.02], total=50) == [50]
    assert noticed(EndsAbove(0.01), [1, 1, 1, 1, 0.001], total=50) == []


def test_what_was_noticed_before_an_interruption_is_known_after_it():
    rows = [{"step": 10 * i, "n": 1.0 if i < 9 else 5.0} for i in range(1, 20)]
    health = Health([Sign("x", "n", Rises(1.5), "do")], 200, rows)
    assert list(health.known) == ["x"]
    assert health.see({"step": 200, "n": 9.0}) == {}
    noted = [
        {"stage": "csd", "step": 3, "health": {"x": "y"}},
        {"stage": "csd", "step": 4},
        {"stage": "a", "step": 5, "health": 3},
    ]
    assert findings(noted) == ["x in csd at step 3: y"]


def test_spread_within_labels_by_hand():
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0], [9.0, 5.0], [7.0, 7.0]])
    labels = torch.tensor([3, 3, 8, 8, 1])
    assert within_labels(features, labels) == pytest.approx((1 + 1 + 4 + 4) / (5 - 3))
    single = torch.arange(5)
    assert within_labels(features, single) == pytest.approx(float(features.var(0).sum()))


def test_a_generator_in_the_eyes_of_its_teacher(tmp_path):
    """The teacher's own sequences have a spread of 1 and all codes; one sequence for all has neither."""
    teacher = open_teacher("digits", torch.device("cpu"))
    samples = TeacherSamples.prepare(tmp_path, teacher, Sampling(), 400, 0, 100)
    teacher.standardise(samples.kept)
    distance = TeacherDistance(teacher, samples, 400, 100)
    tokens, labels = samples.take(torch.arange(400))
    same = distance._look(lambda rows, cond: tokens[rows])
    assert (same.spread, same.codes) == (distance.reference.spread, distance.reference.codes)
    features = teacher.features(tokens, labels).mean(1).detach()
    assert distance.reference.spread == pytest.approx(within_labels(features, labels), rel=1e-4)
    assert torch.allclose(distance.reference.fit.mean, fit_gaussian([features]).mean, atol=1e-5)

    found = distance._look(lambda rows, cond: tokens[:1].expand(len(rows), -1, -1))
    assert found.spread < 0.2 * distance.reference.spread  # the labels alone tell them apart
    assert found.codes <= 16


NUMBERS = {"within_class_spread": 700.0, "recall": 0.89, "precision": 0.88, "teacher_nll": 43.0}


@pytest.mark.parametrize(
    ("generator", "closed", "said"),
    [
        ({}, 0.9, []),
        ({"within_class_spread": 640.0, "recall": 0.82, "teacher_nll": 48.0}, 0.95, []),  # as healthy runs are
        ({}, -0.2, ["failed: the generator is farther"]),
        ({"within_class_spread": 300.0}, 0.5, ["collapse: images of one class vary 43%"]),
        ({"recall": 0.4, "precision": 0.93}, 0.5, ["collapse: precision is the teacher's, recall 45%"]),
        ({"recall": 0.4, "precision": 0.5}, 0.5, []),  # bad, but no collapse
        ({"teacher_nll": 30.0}, 0.5, ["collapse: sequences are likelier to the teacher than its own (30.0 against 43.0"]),
    ],
)
def test_signs_in_the_numbers_of_an_evaluation(generator, closed, said):
    found = signs_of_numbers({"teacher": NUMBERS, "generator": NUMBERS | generator}, closed)
    assert len(found) == len(said)
    assert all(text.startswith(start) for text, start in zip(found, said, strict=True))
    rows = {"teacher": NUMBERS, "generator": {"frechet": 4.0}}
    assert signs_of_numbers({**rows, "guidance": {"frechet": 4.2}}, 0.9) == []
    (lags,) = signs_of_numbers({**rows, "guidance": {"frechet": 9.0}}, 0.9)
    assert lags.startswith("lagging guidance: what the guidance network draws is 2.2 times as far")
    assert signs_of_numbers({"teacher": {}, "generator": {}}, 0.5) == []  # of a teacher that has no such numbers


def test_what_stops_a_training_is_a_known_sign(capsys):
    assert main(["distill", "digits", "--loop.stop-on", "diverging"]) == 2
    assert "loop.stop_on knows divergence, collapse" in capsys.readouterr().err


FAILING = {
    "divergence": ["--csd.d", "sid", "--csd.alpha", "3", "--csd.generator.lr", "0.004", "--csd.k", "1", "--csd.iterations", "40"],
    # A teacher that draws its likeliest codes alone, beside samples of all.
    "collapse": [
        *("--csd.sampling.top-k", "1", "--csd.generator.lr", "0.0015", "--csd.generator.warmup", "5", "--csd.iterations", "40"),
        *("--csd.generator.decay", "constant"),
    ],
    "plateau": [
        *("--csd.generator.lr", "1e-9", "--csd.generator.decay", "constant", "--csd.generator.warmup", "0", "--csd.k", "1"),
        *("--csd.guidance.lr", "1e-9", "--csd.iterations", "45", "--loop.log-every", "1"),
    ],
}
SHOWS = {
    "divergence": {"divergence", "lagging guidance", "off-code tokens", "dead codes", "collapse"},
    "collapse": {"collapse", "average behind"},
    "plateau": {"plateau"},
}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stage1") / "run"
    short = ["--tune.iterations", "60", "--teacher-samples", "2048", "--csd.iterations", "0", "--loop.preview-every", "0"]
    assert main(["distill", "digits_paper", "--out", str(out), *short]) == 0
    return out


def failing(kind: str, stage1: Path, out: Path, *more: str) -> int:
    usual = ["--loop.log-every", "2", "--loop.save-every", "20", "--csd.validation", "256", "--loop.preview-every", "0"]
    usual += ["--teacher-samples", "2048", "--tune.iterations", "60"]
    return main(["distill", "digits_paper", "--stage1", str(stage1), "--out", str(out), *usual, *FAILING[kind], *more])


@pytest.mark.e2e
@pytest.mark.parametrize("kind", FAILING)
def test_a_driven_failure_is_said_everywhere(stage1, tmp_path, capsys, kind):
    """In the terminal, in metrics.jsonl, in evaluate's warnings and on top of the report; the exit code stays 0."""
    out = tmp_path / "run"
    assert failing(kind, stage1, out) == 0
    said = capsys.readouterr().err
    rows = MetricsLog(out / "metrics.jsonl").rows()
    kinds = {name for row in rows for name in row.get("health", {})}
    assert kinds >= SHOWS[kind]
    assert all(f"warning: {name} in csd at step" in said for name in kinds)
    assert main(["evaluate", str(out), "--count", "200", "--no-speed", "--metrics.halves", "2", "--batch", "100"]) == 0
    warnings = json.loads((out / "metrics.json").read_text())["warnings"]
    assert any(text.startswith(f"training: {kind} in csd") for text in warnings)
    assert kind != "divergence" or any(text.startswith("failed: ") for text in warnings)
    page = (out / "report.html").read_text()
    assert page.index("training: ") < page.index("gap closed")


@pytest.mark.e2e
def test_a_training_can_be_told_to_stop(stage1, tmp_path, capsys):
    out = tmp_path / "run"
    assert failing("divergence", stage1, out, "--loop.stop-on", "divergence") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "of 40 as loop.stop_on says: divergence: " in said
    rows = [row for row in MetricsLog(out / "metrics.jsonl").rows() if row["stage"] == "csd"]
    assert rows[-1]["step"] < 40
    assert "divergence" in rows[-1]["health"]
    assert not (out / "generator").exists()
    assert main(["distill", str(out / "config.yaml"), "--loop.stop-on", "plateau"]) == 0  # what stops it may change


@pytest.mark.e2e
def test_a_teacher_that_memorised_is_told_of(tmp_path, capsys):
    """Sixteen sequences, seen many times."""
    tokenizer = str(embedded("teacher") / "tokenizer")
    short = ["--token-images", "16", "--batch", "16", "--iterations", "150", "--optim.lr", "0.003", "--teacher.dropout", "0"]
    sizes = ["--teacher.depth", "2", "--teacher.width", "64", "--teacher.heads", "4"]
    out = tmp_path / "t"
    assert main(["train-teacher", "--tokenizer", tokenizer, "--out", str(out), *short, *sizes, "--loop.preview-every", "0"]) == 0
    assert "warning: memorised: held-out images are much worse" in capsys.readouterr().err
    assert any(text.startswith("memorised in held_out") for text in findings(MetricsLog(out / "metrics.jsonl").rows()))


HEALTHY = sorted((Path(__file__).parent / "healthy").glob("*.jsonl"))


@pytest.mark.parametrize("log", HEALTHY, ids=lambda log: log.stem)
def test_no_false_alarm_on_healthy_runs(log):
    """The logs of runs whose results are in docs/results, every row of them."""
    rows = MetricsLog(log).rows()
    watched = {
        **dict.fromkeys(("csd", "csd_aligned"), signs.CSD),
        **dict.fromkeys(("tune", "tune_head"), signs.TUNE),
        "regress": signs.REGRESS,
        "match": signs.VALIDATION,
        "dd1": (loss_rises("student/loss"),),
    }
    stages = {row["stage"] for row in rows} & watched.keys()
    assert stages & {"csd", "dd1"}
    for stage in stages:
        found = Health(watched[stage], max(row["step"] for row in rows if row["stage"] == stage))
        assert not [text for row in rows if row["stage"] == stage for text in found.see(row).values()]


def test_there_are_healthy_runs_to_look_at():
    assert {log.stem for log in HEALTHY} >= {"demo", "digits_long", "digits_var", "digits_mar", "fashion", "scenes"}


@pytest.mark.e2e
@pytest.mark.parametrize("over", ["velocity", "codes"])
def test_the_guidance_network_draws(stage1, tmp_path, over):
    """As the stage-1 model that it starts as; over codes, as the teacher that it starts as."""
    out = tmp_path / "run"
    usual = ["--teacher-samples", "2048", "--loop.preview-every", "0", "--csd.iterations", "1", "--csd.guidance.lr", "1e-9"]
    if over == "velocity":
        recipe = ["digits_paper", "--stage1", str(stage1), "--tune.iterations", "60"]
    else:
        recipe = ["digits", "--regress.iterations", "1", "--regress.pairs", "64", "--regress.guidance-iterations", "0"]
        recipe += ["--csd.match.prime", "256"]
    assert main(["distill", *recipe, "--out", str(out), *usual]) == 0
    assert (
        main(["evaluate", str(out), "--count", "400", "--no-speed", "--metrics.halves", "2", "--batch", "100", "--guidance"]) == 0
    )
    found = json.loads((out / "metrics.json").read_text())["metrics"]
    like = found["ar_diffusion" if over == "velocity" else "teacher"]
    assert found["guidance"]["teacher_nll"] == pytest.approx(like["teacher_nll"], rel=0.05)
    assert found["guidance"]["accuracy"] > found["onestep_marginal"]["accuracy"]
    assert main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
    assert "Guidance network, 16 AR steps" in (tmp_path / "r.html").read_text()
