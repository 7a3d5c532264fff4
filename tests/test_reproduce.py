"""dd2 reproduce and dd2 report: plans, shared runs, honest verdicts, and a page that opens alone."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dd2.checkpoints.native import save_teacher
from dd2.checkpoints.runs import embedded
from dd2.cli import main
from dd2.data import digits
from dd2.evaluation.features import classifier_features
from dd2.evaluation.gallery import interpolations, nearest_training
from dd2.fields import with_fields
from dd2.generator import Generator
from dd2.reproduce import benches
from dd2.reproduce.benches import Bench, open_bench
from dd2.reproduce.page import Measured, collect, markdown, verdict
from dd2.reproduce.rows import Claim, Row, Table, dd2, value
from dd2.reproduce.tables import TABLES, open_table
from dd2.reproduce.workshop import Cell, Workshop
from dd2.sampling import Ways
from dd2.student import Student
from models import HANG, TINY_HEAD, tiny_teacher, tiny_var

pytestmark = pytest.mark.e2e

SMALL = {
    "teacher_samples": 96,
    "head.depth": 1,
    "head.width": 16,
    "head.frequencies": 4,
    "tune.batch": 8,
    "tune.iterations": 4,
    "tune.draws": 1,
    "csd.batch": 8,
    "csd.iterations": 6,
    "csd.k": 1,
    "loop.preview_every": 0,
}

OWN = {
    "regress.iterations": 3,
    "regress.pairs": 24,
    "regress.batch": 8,
    "regress.guidance_iterations": 1,
    "csd.match.projections": 2,
    "csd.match.prime": 16,
}


@pytest.fixture
def tiny_bench(tmp_path, monkeypatch) -> Bench:
    """The bench `digits` with tiny networks, under the name "tiny"."""
    save_teacher(tmp_path / "teacher", tiny_teacher())
    monkeypatch.chdir(tmp_path)
    bench = open_bench("digits", teacher=str(tmp_path / "teacher"))
    small = {"pairs": 96, "standardise_samples": 48, "ode.steps": 2, "train.batch": 8, "train.iterations": 4}
    distill, paper = with_fields(bench.distill, {**SMALL, **OWN}), with_fields(bench.paper, SMALL)
    dd1 = with_fields(bench.dd1, {**small, "loop.preview_every": 0})
    bench = replace(bench, distill=distill, paper=paper, dd1=dd1, steps=(1, 2))
    monkeypatch.setitem(benches.BENCHES, "tiny", lambda images: bench)
    return bench


@pytest.mark.long
def test_all_tables_of_a_bench(tiny_bench, tmp_path, capsys):
    arguments = ["reproduce", "--bench", "tiny", "--seeds", "0", "--count", "60", "--out", "runs", "--results", "results"]
    assert main([*arguments, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert re.search(r"(\d+) runs, \1 to make", plan)
    assert main(arguments) == 0
    for name in TABLES:
        stem = f"tiny_{'table' if name.isdigit() else ''}{name}"
        content = json.loads((tmp_path / "results" / f"{stem}.json").read_text())
        assert content["seeds"] == [0]
        assert all(len(number["values"]) == 1 for row in content["rows"].values() for number in row.values())
        assert (tmp_path / "results" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        page = (tmp_path / "results" / f"{stem}.md").read_text()
        curves = content.get("curves", {})
        assert bool(curves) == (tmp_path / "results" / f"{stem}_curve.png").is_file() == (name in ("4", "k"))
        assert all([point["step"] for point in runs[0]] == [1, 2, 3, 4, 5, 6] for runs in curves.values())
        assert page.count("**found**") + page.count("**not found**") == len(content["claims"]) > 0
    index = (tmp_path / "results" / "tiny_tables.md").read_text()
    assert all(f"(tiny_{'table' if name.isdigit() else ''}{name}.md)" in index for name in TABLES)
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 0
    assert " 0 to make" in capsys.readouterr().out  # everything is found again
    generators = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("tiny/*/generator/model.safetensors")}
    assert main([*arguments, "--table", "3", "--seeds", "0", "1"]) == 0
    rows = json.loads((tmp_path / "results" / "tiny_table3.json").read_text())["rows"]
    assert all(len(number["values"]) == 2 for row in rows.values() for number in row.values())
    assert all(path.stat().st_mtime_ns == before for path, before in generators.items())


def test_runs_that_share_a_stage_make_it_once(tiny_bench, tmp_path):
    workshop = Workshop(tiny_bench, tmp_path / "shop", 60, "cpu")
    base = workshop.run(Cell("dd2", 0))
    other = workshop.run(Cell("dd2", 0, (("csd.k", 2),)))
    assert (base / "ar_diffusion" / "model.safetensors").read_bytes() == (
        other / "ar_diffusion" / "model.safetensors"
    ).read_bytes()
    assert len(list((tmp_path / "shop").glob("stage1-*"))) == 1
    align = (("align.iterations", 2), ("align.then_iterations", 2))
    aligned = workshop.run(Cell("dd2", 0, align, continues=Cell("dd2", 0)))
    alone = Workshop(tiny_bench, tmp_path / "alone", 60, "cpu").run(Cell("dd2", 0, align))
    same = "generator/model.safetensors"
    assert (aligned / same).read_bytes() == (alone / same).read_bytes()  # going on is the same as doing all of it
    assert (aligned / same).read_bytes() != (base / same).read_bytes()
    folders = {workshop.folder(Cell("dd2", seed, (("csd.k", k),))) for seed in (0, 1) for k in (1, 2)}
    assert len(folders) == 4


def test_the_curve_ends_where_the_generator_is(tiny_bench, tmp_path, capsys):
    workshop = Workshop(tiny_bench, tmp_path / "shop", 60, "cpu")
    for cell, stages in ((Cell("dd2", 0), {"csd"}), (Cell("best", 0), {"regress", "csd"}), (Cell("dd1", 0), {"dd1"})):
        run = workshop.run(cell)
        numbers = workshop.evaluated(cell, curve=True, speed=False)
        last = numbers["curve"][-1]
        assert {point["stage"] for point in numbers["curve"]} == stages
        assert last["frechet"] == pytest.approx(numbers["frechet"]["generator"], rel=1e-9)
        assert last["gap_closed"] == pytest.approx(numbers["gap_closed"], rel=1e-9)
        assert last["teacher_nll"] == pytest.approx(numbers["teacher_nll"]["generator"], rel=1e-9)
        seconds = [point["seconds"] for point in numbers["curve"]]
        assert seconds == sorted(seconds)
        assert seconds[-1] == pytest.approx(sum(json.loads((run / "seconds.json").read_text()).values()), rel=0.5)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "shop").glob("*/evaluations/*.json")}
    points = workshop.evaluated(Cell("dd2", 0), curve=True, speed=False)["curve"]
    assert all(file.stat().st_mtime_ns == before for file, before in files.items())  # found again
    assert len(files) == 3
    assert [point["step"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert len({point["frechet"] for point in points}) > 1
    assert "Distance against training" in (run / "report.html").read_text()
    assert main(["evaluate", str(run), "--count", "60", "--curve", "--no-speed", "--precision", "bfloat16"]) == 0
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["curve"][-1]["frechet"] == numbers["frechet"]["generator"]
    assert len({point["frechet"] for point in numbers["curve"]}) == len(numbers["curve"])
    shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--count", "60", "--curve", "--no-speed"]) == 2
    assert "keeps no checkpoints" in capsys.readouterr().err


def test_table_four_starts_the_networks_where_it_says(tiny_bench, tmp_path):
    workshop = Workshop(with_iterations(tiny_bench, 0), tmp_path / "shop", 60, "cpu")
    tuned = workshop.run(Cell("dd2", 0)) / "generator" / "model.safetensors"
    fresh = workshop.run(Cell("dd2", 0, (("csd.initialised", "guidance"),))) / "generator" / "model.safetensors"
    same = workshop.run(Cell("dd2", 0, (("csd.initialised", "generator"),))) / "generator" / "model.safetensors"
    assert tuned.read_bytes() == same.read_bytes() != fresh.read_bytes()


def with_iterations(bench: Bench, iterations: int) -> Bench:
    return replace(bench, paper=with_fields(bench.paper, {"csd.iterations": iterations}))


def test_verdicts_are_honest():
    def results(a: list[float], b: list[float]) -> dict[str, dict[str, Measured]]:
        seconds = {"seconds": Measured([10.0])}
        return {"a": {"gap": Measured(a), **seconds}, "b": {"gap": Measured(b), "seconds": Measured([15.0])}}

    claim = Claim("a is better", "a", "b")
    assert verdict(claim, results([0.9, 0.92], [0.7, 0.72]))["found"]
    assert not verdict(claim, results([0.7], [0.9]))["found"]
    assert not verdict(claim, results([0.9, 0.6], [0.7, 0.72]))["found"]  # within the spread
    assert not verdict(replace(claim, higher=False), results([0.9], [0.7]))["found"]
    assert not verdict(replace(claim, at_most=0.5), results([0.9], [0.7]))["found"]  # takes two thirds of the time
    assert verdict(replace(claim, at_most=0.7), results([0.9], [0.7]))["found"]
    assert Measured([1.0, 2.0, 3.0]).shown(".1f") == "2.0 ± 1.0"


def test_numbers_of_a_row():
    numbers = {
        "metrics": {"generator": {"frechet": 10.0}, "teacher": {"frechet": 2.0}, "onestep_marginal": {"frechet": 42.0}},
        "frechet": {"onestep_marginal": 42.0, "floor": 2.0},
        "seconds": {"samples": 1.0, "tune": 2.0, "csd": 4.0, "evaluate": 100.0},
    }
    assert value(numbers, "generator", "gap") == 0.8
    assert value(numbers, "teacher", "gap") == 1
    assert value(numbers, "generator", "seconds") == 7
    assert value(numbers, "teacher", "seconds") is None
    assert value(numbers, "generator", "path_length") is None
    table = Table("t", "", [Row("r", "generator", dd2())], ("frechet", "path_length"), [Claim("c", "r", "r")])
    results = collect(table, {"r": [numbers, numbers]})
    made = dict.fromkeys(("bench", "command", "machine", "torch", "commit", "iterations"), "x")
    page = markdown("n", table, results, [], {**made, "seeds": [0, 1], "count": 5, "budget": 1.0, "threads": 1})
    assert "10.00 ± 0.00" in page
    assert "path length" not in page  # no row has one


@pytest.mark.parametrize("name", sorted(benches.BENCHES))
def test_every_bench_describes_every_table(name):
    bench = open_bench(name, images="" if name.startswith("digits") else "images.zip")
    half = bench.scaled(bench.minutes / 2)
    assert half.distill.csd.iterations == round(bench.distill.csd.iterations / 2)
    assert half.dd1.train.iterations == round(bench.dd1.train.iterations / 2)
    for table in TABLES:
        made = open_table(table, bench)
        labels = [row.label for row in made.rows]
        assert len(set(labels)) == len(labels)
        assert {label for claim in made.claims for label in (claim.better, claim.worse)} <= set(labels)


def test_some_rows_of_a_table(tiny_bench, tmp_path, capsys):
    arguments = ["reproduce", "--bench", "tiny", "--table", "3", "--seeds", "0", "--count", "60", "--out", "runs"]
    arguments += ["--results", "results", "--rows"]
    assert main([*arguments, "DD1", "DD2"]) == 0  # with the claim about both
    content = json.loads((tmp_path / "results" / "tiny_table3.json").read_text())
    assert content["rows"].keys() == {"DD1", "DD2"}
    assert [claim["claim"] for claim in content["claims"]] == [
        "DD2 is better than DD1, at no more than half of its training time"
    ]
    assert {path.name.split("-")[0] for path in (tmp_path / "runs" / "tiny").glob("*-*")} == {"stage1", "dd1", "dd2"}
    assert content["command"].endswith("--rows DD1 DD2")
    assert "this library's recipe" not in content["iterations"]
    assert "6 of stage 2 (DD2)" in content["iterations"]
    capsys.readouterr()
    assert main([*arguments, "DD1"]) == 2  # which would lose the other row
    assert "has rows that --rows leaves out (DD2); give another --results" in capsys.readouterr().err
    arguments[arguments.index("results")] = "few"
    assert main([*arguments, "DD1"]) == 0  # with no claim
    page = (tmp_path / "few" / "tiny_table3.md").read_text()
    assert "claims, and what" not in page
    assert "| DD1 | 1 |" in page
    capsys.readouterr()
    assert main([*arguments, "DD3"]) == 2
    assert "table 3 has no row 'DD3'; its rows are 'DD1', 'DD2', " in capsys.readouterr().err


def refused(capsys, *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def test_bad_requests(capsys, tmp_path):
    out = ("--out", tmp_path / "runs", "--results", tmp_path / "results")
    assert "the tables are 1, 2" in refused(capsys, "reproduce", "--table", 6, *out)
    assert "the benches are digits" in refused(capsys, "reproduce", "--bench", "mnist", *out)
    assert "give --images" in refused(capsys, "reproduce", "--bench", "cifar10", *out)
    assert "seeds must be different" in refused(capsys, "reproduce", "--seeds", 1, 1, *out)
    assert not (tmp_path / "runs").exists()
    assert "at least one run" in refused(capsys, "report")
    assert "must end in .html" in refused(capsys, "report", tmp_path, "--out", "x.pdf")
    assert "metrics.json cannot be read" in refused(capsys, "report", tmp_path, "--out", tmp_path / "x.html")
    assert "no ar_diffusion" in refused(capsys, "distill", "digits_paper", "--out", tmp_path / "d", "--stage1", tmp_path)


@pytest.fixture
def page(tiny_bench, tmp_path) -> Path:
    workshop = Workshop(tiny_bench, tmp_path / "shop", 60, "cpu")
    runs = [workshop.run(Cell("dd2", 0)), workshop.run(Cell("dd1", 0))]
    for run in runs:
        workshop.evaluated(Cell("dd2" if run is runs[0] else "dd1", 0), skip=(1,), steps=(1, 2))
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "all.html"), "--data", "digits"]) == 0
    return tmp_path / "all.html"


def test_a_report_of_several_runs(page):
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text
    assert "prefers-color-scheme:dark" in text
    assert "width=device-width" in text
    for heading in (
        "Quality against latency",
        "within-class spread",
        "nearest training images",
        "a walk through the noise",
        "skip-1",
        "2 steps",
        "Speed",
    ):
        assert heading in text
    assert text.count("data:image/png;base64,") == 2 + 2 * 2 + 2  # samples, latency; two pictures and the curves of each run


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_report_opens_in_a_browser(page, tmp_path):
    """No error, no request, every picture decoded: asked of the page itself."""
    probe = """<script>addEventListener("error", e => document.body.dataset.failed = e.message);
    addEventListener("load", () => { const body = document.body.dataset;
      body.images = [...document.images].map(i => i.naturalWidth).join(" ");
      body.requests = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length; });</script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("<body>", f"<body>{probe}"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=True)
    found = re.search(r"<body([^>]*)>", done.stdout)
    assert found is not None
    assert "data-failed" not in found[1]
    assert 'data-requests="0"' in found[1]
    widths = re.search(r'data-images="([\d ]+)"', found[1])
    assert widths is not None
    assert len(widths[1].split()) == 8
    assert all(int(width) > 100 for width in widths[1].split())
    assert "CONSOLE" not in done.stderr


def test_pictures_of_memorising_and_of_walks(tmp_path):
    network = classifier_features(embedded("classifier"), torch.device("cpu"))
    training, _ = digits.batch("train", 200, torch.Generator().manual_seed(0))
    held_out, _ = digits.batch("test", 50, torch.Generator().manual_seed(1))
    copied = nearest_training(network, training[20:60], training, held_out)
    assert copied.distance == pytest.approx(0, abs=1e-2)
    assert copied.held_out > 1
    torch.testing.assert_close(copied.images[20:], copied.images[:20])
    for teacher in (tiny_teacher(), tiny_var()):
        generator = Generator(Student.from_teacher(teacher, TINY_HEAD).eval(), teacher.tokenizer, teacher.conditions)
        walk = interpolations(Ways(generator), rows=2, columns=5)
        assert walk.shape == (10, 1, 16, 16)
        steps = (walk[1:5] - walk[:4]).square().mean((1, 2, 3))
        assert 0 < steps.max() < (walk[4] - walk[0]).square().mean() * 4


@pytest.mark.long
@pytest.mark.parametrize("name", ["cifar10", "cifar10_var"])
def test_a_bench_of_real_images_trains_everything_first(tmp_path, monkeypatch, name):
    """Tokenizer, teacher and classifier from a folder of pictures, then a table, all of it cut short."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for index in range(4):
                pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "images" / split / label / f"{index}.png")
    bench = open_bench(name, images=str(tmp_path / "images"))
    assert bench.tokenizer is not None
    assert bench.teacher is not None
    assert bench.classifier is not None
    quiet = {"loop.preview_every": 0, "batch": 4}
    sizes = {"tokenizer.channels": 32, "tokenizer.z_channels": 32, "tokenizer.res_blocks": 1, "tokenizer.codebook_size": 16}
    family = "var" if name.endswith("_var") else "teacher"
    teacher = {f"{family}.depth": 1, f"{family}.width": 32, f"{family}.heads": 2, "token_images": 16, "iterations": 2}
    small = {"pairs": 24, "standardise_samples": 12, "ode.steps": 1, "train.batch": 4, "train.iterations": 2}
    cut = replace(
        bench,
        tokenizer=with_fields(bench.tokenizer, {**quiet, **sizes, "iterations": 2}),
        teacher=with_fields(bench.teacher, {**quiet, **teacher}),
        classifier=with_fields(bench.classifier, {"iterations": 2, "batch": 4, "classifier.width": 4}),
        distill=with_fields(bench.distill, {**SMALL, **OWN}),
        paper=with_fields(bench.paper, SMALL),
        dd1=with_fields(bench.dd1, small),
    )
    monkeypatch.setitem(benches.BENCHES, name, lambda images: cut)
    arguments = [
        "reproduce",
        "--bench",
        name,
        "--table",
        "3",
        "--seeds",
        "0",
        "--count",
        "20",
        "--images",
        str(tmp_path / "images"),
    ]
    arguments += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "results" / f"{name}_table3.json").read_text())["rows"]
    assert {"DD1", "DD2"} <= rows.keys()
    kept = {path.name.split("-")[0] for path in (tmp_path / "runs" / name).iterdir()}
    assert kept == {"tokenizer", "teacher", "classifier", "stage1", "dd1", "dd2", "best", "features"}
    assert main([*arguments, "--dry-run"]) == 0
    (tmp_path / "runs").rename(tmp_path / "moved")  # what is made stays made where it is moved, evaluations too
    monkeypatch.setattr("dd2.reproduce.workshop.evaluate", pytest.fail)
    assert main([*arguments, "--out", str(tmp_path / "moved")]) == 0
    assert json.loads((tmp_path / "results" / f"{name}_table3.json").read_text())["rows"] == rows


def test_runs_are_named_alike_wherever_root_and_images_lie(tmp_path):
    places = [(tmp_path / "a", "images.zip"), (tmp_path / "b", "/elsewhere/images.zip")]
    shops = [Workshop(open_bench("fashion", images), root, 60, "cpu") for root, images in places]
    for cell in (Cell("dd1", 0), Cell("dd2", 0), Cell("best", 1)):
        assert shops[0].folder(cell).name == shops[1].folder(cell).name
    other = Workshop(open_bench("fashion", "others.zip"), tmp_path / "a", 60, "cpu")
    assert other.folder(Cell("dd1", 0)).name != shops[0].folder(Cell("dd1", 0)).name


@pytest.mark.parametrize("name", TABLES)
def test_no_two_rows_of_a_table_are_the_same_numbers(name, tmp_path):
    bench = open_bench("digits")
    workshop = Workshop(bench, tmp_path, 60, "cpu")
    rows = [(row.method, workshop.folder(row.cell(0))) for row in open_table(name, bench).rows]
    same = "5"  # its first row's heads are the bench's own, said in full
    assert len(set(rows)) == len(rows) or name == same
