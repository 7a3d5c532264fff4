"""dd2 bench: that every number is there and means what its heading says; how large the numbers are is no test's business."""

import json

import pytest
import torch

from dd2.cli import main
from dd2.commands import bench_eq1
from dd2.commands.bench import bench_teacher, paper_recipe, peak_of_tensors
from dd2.commands.bench_eq1 import Shape
from dd2.commands.distill_config import DistillConfig
from dd2.commands.plan import plan
from dd2.commands.plan_config import PlanConfig
from dd2.config import load_config
from dd2.errors import InputError

pytestmark = pytest.mark.e2e


def result(path) -> dict:
    found = json.loads(path.with_suffix(".json").read_text())
    table = path.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + len(found["rows"])
    assert len({line.count("|") for line in table}) == 1
    assert found["machine"]["threads"] == torch.get_num_threads()
    return found


def test_eq1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_eq1, "SHAPES", {"cut": Shape(40, 50_000, 4, 30), "whole": Shape(40, 50_000, 4, 0, 2)})
    assert main(["bench", "eq1", "--out", str(tmp_path / "eq1"), "--repeats", "1"]) == 0
    cut, whole = result(tmp_path / "eq1")["rows"]
    assert cut["faster"] == pytest.approx(cut["plain_ms"] / cut["dd2_ms"])
    assert cut["plain_mb"] > 3 * 40 * 50_000 * 4 / 1e6  # plain torch keeps several blocks of all weights
    assert cut["dd2_mb"] < cut["plain_mb"] / 8
    assert whole["dd2_mb"] < whole["plain_mb"] / 6
    assert max(row["dd2_error"] for row in (cut, whole)) < 1e-3
    assert "| cut |" in capsys.readouterr().out


def test_peaks_are_of_tensors():
    def call() -> None:
        for _ in range(3):
            torch.empty(1000, 1000).fill_(1)

    assert peak_of_tensors(call, torch.device("cpu")) == pytest.approx(4e6, rel=0.01)


def test_sample_train_and_a_plan_with_its_rates(tmp_path):
    options = ["--models", "digits", "--repeats", "1"]
    precisions = ["--precisions", "float32", "bfloat16"]
    assert main(["bench", "sample", *options, *precisions, "--batches", "2", "--profile", "--out", str(tmp_path / "s")]) == 0
    assert "digits, batch 2, bfloat16" in (tmp_path / "s_profile.md").read_text()
    rows = result(tmp_path / "s")["rows"]
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        whole = row["one_step"] + row["decoding"]
        assert row["images_per_second"] == pytest.approx(1 / whole)
        assert row["faster"] == pytest.approx((row["teacher"] + row["decoding"]) / whole)
        assert 0 < row["share"] < 2
        assert row["peak_gb"] > 0.1
    assert main(["bench", "train", *options, "--batch", "4", "--out", str(tmp_path / "t")]) == 0
    found = result(tmp_path / "t")
    (row,) = found["rows"]
    assert row["iteration"] == pytest.approx(row["k"] * row["guidance"] + row["generator"])
    rate = 1e9 * row["gflops_per_second"]
    assert row["share"] == pytest.approx(rate / found["matmul_flops_per_second"]["float32"])
    planned = plan(load_config(PlanConfig, "digits_paper", ["--rates", str(tmp_path / "t.json")]))
    assert planned.seconds == pytest.approx(planned.flops / rate)
    assert main(["plan", "digits_paper", "--rates", str(tmp_path / "t.json"), "--loop.precision", "bfloat16"]) == 2
    assert main(["plan", "digits_paper", "--rates", str(tmp_path / "s.json")]) == 2


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    for arguments, message in (
        (["sample", "--models", "var_d99"], "there is no model var_d99"),
        (["train", "--models", "llamagen_t2i_xl"], "there is no model llamagen_t2i_xl"),
        (["sample", "--batches", "0"], "at least 1"),
        (["eq1", "--repeats", "0"], "repeats must be at least 1"),
    ):
        assert main(["bench", *arguments, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("[]")
    assert main(["plan", "digits_paper", "--rates", str(tmp_path / "bad.json")]) == 2
    assert "cannot be read as results of dd2 bench train" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.json"]


def test_released_models_have_their_sizes():
    with pytest.raises(InputError, match="known are digits, var_d16"):
        bench_teacher("none", torch.device("cpu"), 0)


def test_every_model_has_a_configuration_of_the_papers_recipe():
    for name in ("digits", "var_d16", "var_d36_512", "llamagen_b", "llamagen_xl_384"):
        run = load_config(DistillConfig, paper_recipe(name))
        assert run.networks.need_stage1
    assert paper_recipe("var_d20") == "var_d20_paper"
    assert paper_recipe("var_d30") == "var_d24_paper"
