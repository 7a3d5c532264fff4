"""The command line: bad input gives one clear line and exit code 2; good input gives what --help promises."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dd2.checkpoints.native import Role, load_teacher, save_generator, save_teacher, save_tokenizer
from dd2.checkpoints.record import RunRecord
from dd2.checkpoints.runs import embedded
from dd2.cli import COMMANDS, main
from dd2.commands.dd1 import DD1RunConfig
from dd2.commands.distill_config import DistillConfig
from dd2.commands.train_teacher import TrainTeacherConfig
from dd2.commands.train_tokenizer import TrainTokenizerConfig
from dd2.config import find_yaml, load_config
from dd2.fields import flat
from dd2.generator import Generator
from dd2.student import Student
from dd2.teachers.code import require_codes
from dd2.teachers.filtering import Sampling
from dd2.training.loop import LoopConfig
from dd2.training.samples import TeacherSamples
from dd2.yaml_files import to_yaml
from models import HANG, TINY_HEAD, tiny_teacher


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    save_teacher(folder, tiny_teacher())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_folder) -> Path:
    """A run folder as dd2 distill leaves it, with untrained networks."""
    folder = tmp_path_factory.mktemp("run")
    teacher = require_codes(load_teacher(teacher_folder), "a test")
    samples = TeacherSamples.prepare(folder / "teacher_samples", teacher, Sampling(), 200, 0)
    teacher.standardise(samples.kept)
    roles: tuple[Role, ...] = ("generator", "ar_diffusion")
    for name in roles:
        save_generator(
            folder / name, Generator(Student.from_teacher(teacher, TINY_HEAD), teacher.tokenizer, teacher.conditions), role=name
        )
    (folder / "config.yaml").write_text(to_yaml(DistillConfig(teacher=str(teacher_folder), out=folder)))
    RunRecord("distill", str(teacher_folder), "", Sampling(), TINY_HEAD).write(folder)
    (folder / "versions.json").write_text(json.dumps({"threads": 1}))
    (folder / "seconds.json").write_text(json.dumps({"tune": 1.0, "csd": 2.0}))
    return folder


def refused(capsys, *arguments: object) -> str:
    """Run dd2, demand exit code 2 and one line, and return the line."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    errors = capsys.readouterr().err
    assert code == 2, errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("dd2: ")
    assert "Traceback" not in errors
    return lines[0]


@pytest.mark.e2e
def test_errors_are_one_line_where_the_terminal_knows_ascii_alone(tmp_path):
    command = [sys.executable, "-m", "dd2", "distill", "--out", str(tmp_path / "r")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for flags, said in (
        (["--csd.ema", "1"], "csd.ema must be in [0, 1), got 1.0"),
        (["--csd.k", "x"], "--csd.k"),
    ):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert "---" not in done.stderr


def test_bad_commands_and_flags(capsys, tmp_path):
    out = ("--out", tmp_path / "r")
    assert "the commands are demo, distill" in refused(capsys, "distil")
    assert "--csd.lrr" in refused(capsys, "distill", *out, "--csd.lrr", 3)
    assert "--csd.k" in refused(capsys, "distill", *out, "--csd.k", "many")
    assert "csd.k must be at least 1, got 0" in refused(capsys, "distill", *out, "--csd.k", 0)
    assert "sid" in refused(capsys, "distill", *out, "--csd.d", "kl")
    assert "lr must be a positive number" in refused(capsys, "distill", *out, "--tune.optim.lr", -1)
    assert "betas must lie in [0, 1)" in refused(capsys, "distill", *out, "--tune.optim.betas", 0.9, 1.5)
    assert "0 < low < high < 1" in refused(capsys, "distill", *out, "--tune.noise-level.low", 0)
    assert "top_p must be in (0, 1]" in refused(capsys, "distill", *out, "--tune.sampling.top-p", 0)
    assert "head.width must be at least 1" in refused(capsys, "distill", *out, "--head.width", 0)
    assert "teacher_samples must be at least 1" in refused(capsys, "distill", *out, "--teacher-samples", 0)
    assert "align.then_iterations" in refused(capsys, "distill", *out, "--align.iterations", 5)
    assert "loop.save_every must be at least 1" in refused(capsys, "distill", *out, "--loop.save-every", 0)
    assert "csd.ema must be in [0, 1)" in refused(capsys, "distill", *out, "--csd.ema", 1)
    assert "seed must be in 0" in refused(capsys, "distill", *out, "--seed", -1)
    assert "dropout" in refused(capsys, "train-teacher", *out, "--teacher.dropout", 2)
    assert "kv_heads" in refused(capsys, "train-teacher", *out, "--teacher.kv-heads", -1)
    assert "tokenizer.groups" in refused(capsys, "train-tokenizer", *out, "--tokenizer.channels", 48)
    assert "groups must be at least 1" in refused(capsys, "train-tokenizer", *out, "--tokenizer.groups", 0)
    assert "unexpected argument" in refused(capsys, "distill", "digits", "more")
    assert "not available here" in refused(capsys, "distill", *out, "--device", "cuda:99")
    assert "not available here" in refused(capsys, "distill", *out, "--device", "gpu")
    assert not (tmp_path / "r").exists()


def test_bad_configurations(capsys, tmp_path):
    file = tmp_path / "c.yaml"

    def with_content(text: str) -> str:
        file.write_text(text)
        return refused(capsys, "distill", file, "--out", tmp_path / "r")

    assert "does not exist; give a YAML file, or one of dd2's own" in refused(capsys, "distill", tmp_path / "no.yaml")
    assert f"{file}: there is no field csd.lrr; did you mean csd" in with_content("csd: {lrr: 1}")
    assert f"{file}: " in (line := with_content("csd: {k: many}"))
    assert "csd.k" in line
    assert "is not valid YAML" in with_content("csd: {k: 1")
    assert "must be a mapping" in with_content("- 1\n- 2")
    assert "is null" in with_content("seed:")
    assert "is not valid YAML" in with_content("seed: 2026-13-45")
    assert "csd is a section" in with_content("csd: 3")
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not valid YAML" in refused(capsys, "distill", file)
    assert "there is no field" in refused(capsys, "distill", "digits_tokenizer")
    assert not (tmp_path / "r").exists()


def test_bad_folders_and_weights(capsys, tmp_path, teacher_folder):
    out = ("--out", tmp_path / "r")
    assert "teacher nowhere does not exist" in refused(capsys, "distill", *out, "--teacher", "nowhere")
    assert "has no config.json" in refused(capsys, "distill", *out, "--teacher", tmp_path)
    assert "where a teacher was expected" in refused(capsys, "distill", *out, "--teacher", teacher_folder / "tokenizer")

    def broken(change) -> str:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(teacher_folder, folder)
        change(folder)
        return refused(capsys, "distill", *out, "--teacher", folder)

    def rewrite(name: str, **values):
        return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / weights)
        tensors["output.weight"][0, 0] = float("nan")
        save_file(tensors, folder / weights)

    weights = "model.safetensors"
    assert "missing or damaged" in broken(lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:1000]))
    assert "missing or damaged" in broken(lambda f: (f / weights).unlink())
    assert "missing or damaged" in broken(lambda f: torch.save({"a": torch.ones(1)}, f / weights))
    assert "is not valid JSON" in broken(lambda f: (f / "config.json").write_text("{"))
    assert "unknown family 'maskgit'" in broken(rewrite("config.json", family="maskgit"))
    assert "does not describe a LlamaGenConfig" in broken(rewrite("config.json", config={"wdith": 3}))
    sizes = json.loads((teacher_folder / "config.json").read_text())["config"]
    assert "depth is 2.5" in broken(rewrite("config.json", config={**sizes, "depth": 2.5}))
    assert "does not describe" in broken(lambda f: (f / "config.json").write_text('{"kind": "teacher", "family": "llamagen"}'))
    assert "holds NaN" in broken(spoil)
    assert "tensors differ, first" in broken(rewrite("config.json", config={**sizes, "depth": 3}))
    assert "not trained together" in broken(rewrite("config.json", config={**sizes, "rows": 5}))
    assert "has no config.json" in broken(lambda f: shutil.rmtree(f / "tokenizer"))

    locked = tmp_path / "file"
    locked.write_text("not a folder")
    assert "cannot be written to" in refused(capsys, "distill", "--teacher", teacher_folder, "--out", locked / "run")
    assert "cannot be written to" in refused(capsys, "distill", "--teacher", teacher_folder, "--out", "/proc/dd2")
    assert not (tmp_path / "r").exists()


def test_bad_samples_and_evaluations(capsys, tmp_path, run):
    out = ("--out", tmp_path / "x.png")
    assert "Missing from dd2 sample: RUN" in refused(capsys, "sample", *out)
    assert "does not exist" in refused(capsys, "sample", tmp_path / "none", *out)
    assert "has no config.json" in refused(capsys, "sample", tmp_path, *out)
    assert "label 3 is not a class of this model; its classes are 0 to 2" in refused(
        capsys, "sample", run, *out, "--labels", "1,3"
    )
    assert "is no number" in refused(capsys, "sample", run, *out, "--labels", "one")
    assert "count must be at least 1" in refused(capsys, "sample", run, *out, "--count", 0)
    assert "batch must be at least 1" in refused(capsys, "sample", run, *out, "--batch", 0)
    assert "steps must be 1" in refused(capsys, "sample", run, *out, "--steps", 18)
    assert "goes with method generator only" in refused(capsys, "sample", run, *out, "--steps", 2, "--method", "teacher")
    assert "must end in .png or .npz" in refused(capsys, "sample", run, "--out", tmp_path / "x.jpeg")
    assert "cannot be written to" in refused(capsys, "sample", run, "--out", "/proc/dd2/x.png")
    assert "has no run.json" in refused(capsys, "sample", run / "generator", *out, "--method", "teacher")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("teacher: digits")
    assert f"resume it with dd2 distill {unfinished}/config.yaml" in refused(capsys, "sample", unfinished, *out)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    RunRecord("distill", "digits", "", Sampling(), TINY_HEAD).write(other)
    assert "not the one that was distilled" in refused(capsys, "sample", other, *out, "--method", "teacher")
    (other / "teacher_samples" / "samples.json").unlink()
    assert "another tokenizer" in refused(capsys, "sample", other, *out, "--method", "teacher")
    (tmp_path / "d.png").mkdir()
    assert "is a folder" in refused(capsys, "sample", run, "--out", tmp_path / "d.png")
    assert "is not empty" in refused(capsys, "sample", run, "--out", other)
    assert "seed must be in 0" in refused(capsys, "sample", run, *out, "--seed", 10**30)
    assert "top_p must be in (0, 1]" in refused(capsys, "sample", run, *out, "--method", "teacher", "--top-p", 2)
    assert "count must be at least 2" in refused(capsys, "evaluate", run, "--count", 1)
    assert "module:function" in refused(capsys, "evaluate", run, "--features", "nothing")
    assert "cannot be imported" in refused(capsys, "evaluate", run, "--features", "no_such_module:f")
    assert "has no function" in refused(capsys, "evaluate", run, "--features", "json:no_such")
    assert "module:function" in refused(capsys, "evaluate", run, "--features", ":f")
    damaged = tmp_path / "classifier"
    shutil.copytree(embedded("classifier"), damaged)
    (damaged / "model.safetensors").write_bytes(b"short")
    assert "is damaged" in refused(capsys, "evaluate", run, "--features", damaged)
    shutil.copy(run / "run.json", other)
    shutil.copy(run / "teacher_samples" / "samples.json", other / "teacher_samples")
    record = json.loads((run / "run.json").read_text())
    for damaged_record in ("{", "[]", json.dumps(record | {"teacher": 3}), json.dumps(record | {"sampling": {"top_k": "many"}})):
        (other / "run.json").write_text(damaged_record)
        assert "run.json" in refused(capsys, "evaluate", other)
    shutil.copy(run / "run.json", other)
    (other / "seconds.json").unlink()
    assert "lacks seconds.json" in refused(capsys, "evaluate", other)
    (tmp_path / "evaluate.yaml").write_text("count: 1")
    assert "count must be at least 2" in refused(capsys, "evaluate", run, tmp_path / "evaluate.yaml")
    assert list(tmp_path.glob("x*")) == []


def test_bad_training_data(capsys, tmp_path):
    sizes = ("--tokenizer.image-size", 16, "--tokenizer.multipliers", 1, 1, "--out", tmp_path / "r")

    def tokenizer(data: object, *more: object) -> str:
        return refused(capsys, "train-tokenizer", "--data", data, *sizes, *more)

    assert "does not exist" in tokenizer(tmp_path / "none")
    assert "there are no images in it" in tokenizer(tmp_path)
    (tmp_path / "x.zip").write_text("no zip")
    assert "neither a folder nor a whole zip" in tokenizer(tmp_path / "x.zip")
    assert "the digits are 1 x 16 x 16" in tokenizer("digits")
    assert "cannot be halved" in tokenizer("digits", "--tokenizer.image-size", 15)
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "a.png").write_text("no image")
    assert "cannot be read as an image" in tokenizer(tmp_path / "images")
    assert "1 or 3 channels" in tokenizer(tmp_path / "images", "--tokenizer.image-channels", 4)
    assert "is not a tokenizer folder" in refused(capsys, "train-teacher", "--tokenizer", tmp_path)


def test_another_configuration_does_not_resume_a_run(capsys, tmp_path, teacher_folder):
    from dd2.commands.run_folder import start_run

    config = DistillConfig(teacher=str(teacher_folder), out=tmp_path)
    start_run(tmp_path, config, "distill")
    start_run(tmp_path, config, "distill")
    changed = ("--teacher", teacher_folder, "--out", tmp_path, "--csd.k", 3, "--seed", 4)
    line = refused(capsys, "distill", *changed)
    assert "seed was 0, now 4 (and 1 more)" in line
    start_run(tmp_path, replace(config, loop=LoopConfig(save_every=3)), "distill")  # changes nothing that is computed


def test_fields_without_a_flag_may_stand_in_a_file(tmp_path, capsys):
    """In any order, and what is typed comes first."""
    from dd2.commands.export import ExportConfig

    file = tmp_path / "export.yaml"
    for text, typed, expected in (
        ("out: b\nrun: a\nstep: best", [], ("a", "b", "best")),
        ("run: a\nout: b", ["c"], ("c", "b", "newest")),
        ("out: b", ["c"], ("c", "b", "newest")),
        ("run: a\nout: b", ["c", "d", "--step", "3"], ("c", "d", "3")),
    ):
        file.write_text(text)
        config = load_config(ExportConfig, str(file), typed)
        assert (str(config.run), str(config.out), config.step) == expected


def test_runs_of_an_older_dd2_are_told_apart(capsys, tmp_path, teacher_folder):
    (tmp_path / "config.yaml").write_text("distill: {k: 3}")
    assert "a run of an older dd2" in refused(capsys, "distill", "--teacher", teacher_folder, "--out", tmp_path)
    assert "distill.k is called csd.k now" in refused(capsys, "distill", tmp_path / "config.yaml")
    assert "--distill.k is called --csd.k now" in refused(capsys, "distill", "--distill.k", 3)
    assert "made by an older dd2" in refused(capsys, "evaluate", tmp_path)


def test_a_run_folder_has_one_process(capsys, tmp_path, teacher_folder):
    import fcntl

    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another dd2" in refused(capsys, "distill", "--teacher", teacher_folder, "--out", tmp_path)


def test_help_is_worth_reading(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"dd2 {name}" in overview for name in COMMANDS)
    for name, command in COMMANDS.items():
        assert main([*name.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert "--out" in text or "OUT" in text or name in ("evaluate", "inspect", "push", "serve", "env", "completion")
        assert len(text) > (250 if name == "env" else 500)
        assert (command.load()[0].__doc__ or "?").strip().splitlines()[0] in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dd2 ")


CONFIGS = {file.stem: file.read_text() for file in find_yaml("digits").parent.glob("*.yaml")}
DISTILL_CONFIGS = sorted(name for name, text in CONFIGS.items() if "\ncsd:" in text)
DD1_CONFIGS = sorted(name for name, text in CONFIGS.items() if "\npairs:" in text)


@pytest.mark.parametrize("name", DISTILL_CONFIGS)
def test_packaged_configurations_load_and_survive_a_round_trip(name, tmp_path):
    config = load_config(DistillConfig, name)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(DistillConfig, str(tmp_path / "again.yaml")) == config
    assert set(flat(config)) == set(flat(DistillConfig()))
    assert load_config(DistillConfig, f"configs/{name}.yaml", ["--csd.k", "9"]).csd.k == 9


@pytest.mark.parametrize("name", DD1_CONFIGS)
def test_packaged_baselines_load(name):
    config = load_config(DD1RunConfig, name)
    assert config.heads.logits_steps > 0
    assert config.out.name == name


@pytest.mark.parametrize("kind", ["digits", "digits_var"])
def test_packaged_training_configurations_load(kind):
    tokenizer, teacher = (
        load_config(TrainTokenizerConfig, f"{kind}_tokenizer"),
        load_config(TrainTeacherConfig, f"{kind}_teacher"),
    )
    assert teacher.tokenizer == tokenizer.out / "tokenizer"
    assert load_config(DistillConfig, kind).teacher in ("digits", str(teacher.out / "teacher"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sample_keeps_what_is_done(run, tmp_path, number):
    arguments = [run, "--count", 10**6, "--batch", 50, "--out", tmp_path / "a.npz", "--precision", "float32", "--seed", 3]
    command = [sys.executable, "-m", "dd2", "sample", *map(str, arguments)]
    # A job in the background of a shell script ignores Ctrl-C, and so would what it starts.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + HANG
        while sum(path.stat().st_size for path in tmp_path.iterdir()) < 50_000:  # pixels are on their way to the disk
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=HANG)[1]
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    kept = np.load(tmp_path / "a.npz")
    done = len(kept["arr_0"])
    assert 0 < done < 10**6
    assert done % 50 == 0
    assert kept["seeds"].tolist() == list(range(3, 3 + done))
    assert f"the first {done} of 1000000 images are in" in said
    assert f"--first {done} --count {10**6 - done}" in said


def test_sample_writes_what_it_is_asked_for(run, tmp_path, capsys):
    def sample(*arguments: object) -> None:
        assert main(["sample", *map(str, arguments)]) == 0

    exact = ("--labels", "2,0", "--seed", 10, "--precision", "float32")
    sample(run, *exact, "--count", 5, "--out", tmp_path / "a.npz", "--batch", 2)
    a = np.load(tmp_path / "a.npz")
    assert (a["arr_0"].shape, a["arr_0"].dtype) == ((5, 16, 16, 1), np.uint8)
    assert a["labels"].tolist() == [2, 0, 2, 0, 2]
    assert a["seeds"].tolist() == [10, 11, 12, 13, 14]
    for more, whole in ((("--seed", 12, "--count", 2), slice(2, 4)), (("--first", 1, "--count", 3), slice(1, 4))):
        out = tmp_path / f"{more[0]}.npz"
        sample(run, *exact, *more, "--out", out)
        found = np.load(out)
        close = np.abs(found["arr_0"].astype(int) - a["arr_0"][whole].astype(int))
        assert close.max() <= 1  # the same seeds and labels in another batch, up to rounding
        assert all(np.array_equal(found[name], a[name][whole]) for name in ("labels", "seeds"))
    sample(run, "--count", 3, "--out", tmp_path / "folder")
    names = ["000000_label0_seed0.png", "000001_label1_seed1.png", "000002_label2_seed2.png"]
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == names
    sample(run / "generator", "--count", 7, "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] == grid.size[1] == 3 * (3 * 18 + 2)
    for extra in (("--method", "teacher"), ("--method", "ar_diffusion"), ("--steps", 4), ("--decoding", "nearest")):
        sample(run, "--count", 4, "--out", tmp_path / "one.npz", *extra)
        assert len(np.load(tmp_path / "one.npz")["arr_0"]) == 4


@pytest.mark.e2e
def test_evaluate_writes_numbers_pictures_and_a_page(run, capsys):
    assert main(["evaluate", str(run), "--count", "150", "--batch", "64"]) == 0
    assert "gap closed" in capsys.readouterr().out
    numbers = json.loads((run / "metrics.json").read_text())
    assert set(numbers["frechet"]) == {"floor", "onestep_marginal", "ar_diffusion", "generator", "generator_nearest"}
    assert {"teacher", "generator"} <= numbers["teacher_nll"].keys() & numbers["accuracy"].keys()
    assert set(numbers["seconds"]) == {"tune", "csd", "evaluate", "total"}
    f = numbers["frechet"]
    assert numbers["gap_closed"] == pytest.approx((f["onestep_marginal"] - f["generator"]) / (f["onestep_marginal"] - f["floor"]))
    assert f["floor"] < f["generator"]  # untrained
    assert numbers["teacher_nll"]["teacher"] < numbers["teacher_nll"]["onestep_marginal"]
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http://" not in page
    assert "https://" not in page
    for name in ("samples.png", "curves.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 100


@pytest.mark.e2e
def test_evaluations_in_two_precisions(run, tmp_path, capsys):
    """What was used is printed and stored; features of one precision are not taken for the other's."""
    found = {}
    for precision in ("float32", "bfloat16"):
        arguments = ["--count", "60", "--no-speed", "--precision", precision, "--cache", str(tmp_path / "banks")]
        assert main(["evaluate", str(run), *arguments]) == 0
        assert f"drawn in {precision}" in capsys.readouterr().out
        found[precision] = json.loads((run / "metrics.json").read_text())
        assert found[precision]["evaluation"]["precision"] == precision
    identities = [json.loads(file.read_text()) for file in (tmp_path / "banks").rglob("identity.json")]
    of_generator = [identity["precision"] for identity in identities if identity["method"] == "generator"]
    assert sorted(of_generator) == ["bfloat16", "float32"]
    a, b = (found[name]["metrics"]["onestep_marginal"] for name in found)
    assert a["teacher_nll"] == b["teacher_nll"]  # tokens that no network draws, scored by the float32 teacher either way
    assert main(["report", str(run), "--out", str(tmp_path / "r.html"), "--precision", "float32"]) == 0
    assert "float16 is for CUDA" in refused(capsys, "evaluate", run, "--precision", "float16")


@pytest.mark.e2e
def test_evaluate_extras(run, tmp_path, capsys):
    """Few steps, path length, export; a second evaluation finds the features of the first."""
    arguments = ["evaluate", str(run), "--count", "60", "--batch", "30", "--steps", "1", "3", "--path-length", "20"]
    arguments += ["--export", str(tmp_path / "samples.npz")]
    assert main(arguments) == 0
    numbers = json.loads((run / "metrics.json").read_text())
    assert {"precision", "kid", "sfid", "frechet_95", "teacher_nll"} <= numbers["metrics"]["generator_3_steps"].keys()
    assert numbers["path_length"]["generator"]["mean"] > 0
    assert numbers["evaluation"]["reference"]["reference"] == "teacher"
    assert main(["reference", str(tmp_path / "samples.npz"), str(tmp_path / "stats.npz")]) == 0
    fid_infinity = ["--count", 60, "--metrics.fid-infinity", "--reference", tmp_path / "stats.npz"]
    assert "needs 256 images, got 60" in refused(capsys, "evaluate", run, *fid_infinity)
    assert "path_length must be 0" in refused(capsys, "evaluate", run, "--path-length", 2)
    exported = np.load(tmp_path / "samples.npz")["arr_0"]
    assert exported.shape == (60, 16, 16, 1)
    assert exported.dtype == np.uint8
    assert len(np.unique(exported.reshape(60, -1), axis=0)) > 50
    banks = {file: file.stat().st_mtime_ns for file in (run / "features").rglob("*.safetensors")}
    assert main(arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in (run / "features").rglob("*.safetensors")} == banks
    assert "no multiple of the 3 labels" in refused(capsys, "evaluate", run, "--count", 61)
    assert main(["evaluate", str(run), "--count", "61", "--allow-unbalanced"]) == 0
    assert main(["reference", str(tmp_path / "samples.npz"), str(tmp_path / "r.npz")]) == 0
    assert main(["evaluate", str(run), "--count", "60", "--reference", str(tmp_path / "r.npz")]) == 0
    assert "warning: 60 images" in capsys.readouterr().out


@pytest.mark.e2e
def test_users_features(run, tmp_path, monkeypatch):
    (tmp_path / "row_features.py").write_text("def mean_rows(images):\n    return images.mean(-1).flatten(1)\n")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run), "--count", "60", "--features", "row_features:mean_rows"]) == 0
    numbers = json.loads((run / "metrics.json").read_text())
    assert numbers["features"] == "row_features:mean_rows"
    assert numbers["accuracy"] == {}


def test_tokenizer_folder_round_trip(tmp_path, teacher_folder):
    from dd2.checkpoints.native import load_tokenizer

    teacher = tiny_teacher()
    save_tokenizer(tmp_path / "t", teacher.tokenizer, torch.float16)
    images = torch.randn(2, 1, 16, 16)
    kept = load_tokenizer(tmp_path / "t")
    assert kept.codebook.dtype == torch.float32
    torch.testing.assert_close(
        kept.decode(kept.encode(images)), teacher.tokenizer.decode(kept.encode(images)), atol=0.05, rtol=0.05
    )
    again = require_codes(load_teacher(teacher_folder), "a test")
    labels = torch.tensor([0, 1])
    assert torch.equal(again.generate(labels, Sampling(), [3, 4]), teacher.generate(labels, Sampling(), [3, 4]))


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(tmp_path, monkeypatch):
    """Shells leave it behind --flag= and in files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("out: ~/runs/a\nteacher: ~/teacher\n")
    config = load_config(DistillConfig, str(tmp_path / "mine.yaml"), ["--captions=~/captions.safetensors"])
    assert config.out == tmp_path / "runs" / "a"
    assert config.teacher == str(tmp_path / "teacher")
    assert config.captions == str(tmp_path / "captions.safetensors")
    assert load_config(DistillConfig, "", ["--out", "a~/b"]).out == Path("a~/b")


@pytest.mark.e2e
@pytest.mark.parametrize(
    "environment",
    [{"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, {"PYTHONIOENCODING": "ascii"}],
    ids=lambda environment: next(iter(environment)),
)
def test_what_notebooks_and_terminals_set_does_no_harm(environment):
    """Help has letters that ASCII lacks; pictures need no window."""
    code = "import sys; from dd2.cli import main; sys.argv = ['dd2', 'distill', '--help']; main(); import matplotlib.pyplot"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, timeout=HANG)
    assert done.returncode == 0, done.stderr.decode()
    assert b"--csd.iterations" in done.stdout


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "windows.yaml").write_bytes("out: café\n".encode("utf-8-sig"))
    assert load_config(DistillConfig, str(tmp_path / "windows.yaml")).out == Path("café")
