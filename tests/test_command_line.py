"""What people write: YAML's opinions about it, lists, names, options before what has none, and flags without effect."""

import errno
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dd2.cli import COMMANDS, main
from dd2.commands.distill_config import DistillConfig
from dd2.commands.sample import SampleConfig, parse_labels
from dd2.config import load_config
from dd2.errors import InputError
from dd2.evaluation.config import EvaluateConfig
from dd2.fields import field_types, flat
from dd2.resources import memory_said, system_said
from dd2.teachers.conditions import ClassLabels
from edges import result_or_one_line


def refusal(tmp_path: Path, content: str) -> str:
    """What is said of a configuration with this content, without the name of its file."""
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as refused:
        load_config(DistillConfig, str(file))
    start = f"{file}: "
    assert str(refused.value).startswith((start, f"configuration {file} "))
    return str(refused.value).removeprefix(start)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("device: no", "device is false, it must be a text; YAML reads yes, no, on and off so: put it in quotes"),
        ("teacher: on", "teacher is true, it must be a text; YAML reads"),
        ("csd: {snap_teacher: n}", "csd.snap_teacher is 'n', it must be true or false"),
        ("teacher: [a, b]", "teacher is ['a', 'b'], it must be a text"),
        ("seed: 1e3", "seed is '1e3', it must be a whole number; write 1000"),
        ("seed: 1000.0", "seed is 1000.0, it must be a whole number; write 1000"),
        ("seed: 2024-01-01", "seed is 2024-01-01, it must be a whole number"),
        ("csd: {batch: yes}", "csd.batch is true, it must be a whole number"),
        ("csd: {k: [1, 2]}", "csd.k is [1, 2], it must be a whole number"),
        ("csd: {k: null}", "csd.k is null, it must be a whole number"),
        ("csd: 3", "csd is a section, not a value; give fields of it: csd.iterations"),
        ("csd: {d: no}", "csd.d is false, it must be one of sid, dmd, sim; YAML reads"),
        ("csd: {d: 5}", "csd.d is 5, it must be one of sid, dmd, sim"),
        ("csd: {sampling: {cfg_scale: yes}}", "csd.sampling.cfg_scale is true, it must be a number or null"),
        ("loop: {tensorboard: 1}", "loop.tensorboard is 1, it must be true or false"),
    ],
)
def test_a_value_of_another_kind_is_named_by_its_field(tmp_path, content, said):
    assert refusal(tmp_path, content).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("csd:\n  k: 3\nout: a\ncsd:\n  batch: 8\n", "csd stands there twice (line 4)"),
        ("csd:\n  k: 3\n  k: 5\n", "k stands there twice (line 3)"),
        ("csd: {k: 2}\ncsd.k: 3", "csd.k stands there twice"),
    ],
)
def test_what_stands_twice_in_a_file_is_refused(tmp_path, content, said):
    assert said in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "field", "value"),
    [
        ("seed: 1_000", "seed", 1000),
        ('seed: "5"', "seed", 5),
        ("teacher_samples: 0x10", "teacher_samples", 16),
        ("out: 5", "out", Path("5")),
        ('device: "cpu"', "device", "cpu"),
        ("csd: {generator: {lr: 1e-3}}", "csd.generator.lr", 0.001),  # to YAML a text
        ("csd: {generator: {lr: 1}}", "csd.generator.lr", 1.0),
        ("csd: {sampling: {cfg_scale: null}}", "csd.sampling.cfg_scale", None),
        ("csd: {further_emas: 0.5}", "csd.further_emas", (0.5,)),
    ],
)
def test_spellings_that_mean_the_value(tmp_path, content, field, value):
    (tmp_path / "c.yaml").write_text(content)
    found = flat(load_config(DistillConfig, str(tmp_path / "c.yaml")))[field]
    assert (tuple(found) if isinstance(found, list) else type(value)(found) if value is not None else found) == value


SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text("ab1-e.: ", max_size=5)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([name for name, _ in field_types(DistillConfig)]), value=SCALARS | st.lists(SCALARS, max_size=2))
def test_any_value_in_any_field_is_read_or_refused(tmp_path_factory, name, value):
    content = value
    for part in reversed(name.split(".")):
        content = {part: content}
    file = tmp_path_factory.mktemp("y") / "c.yaml"
    file.write_text(yaml.safe_dump(content))
    with result_or_one_line():
        load_config(DistillConfig, str(file))


KEYS = "abcdefghi"
LAUGHS = [f"{key}: &{key} {{{', '.join(f'{x}: *{old}' for x in 'pqrstuvw')}}}" for old, key in itertools.pairwise(KEYS)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n".join(["a: &a {x: 1}", *LAUGHS]), "more than 1,000 fields"),  # 8^8 of them
        ("a: &a {b: *a}", "refers to itself"),
        ("trust: &a [*a]", "a list inside of its list"),
        ("a: " + "[" * 5000, "is not valid YAML"),
        ("teacher: [[1]]", "a list inside of its list"),
    ],
)
def test_files_that_stand_for_too_much(tmp_path, content, said):
    assert said in refusal(tmp_path, content)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_configuration_or_one_line(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("y") / "c.yaml"
    file.write_bytes(content)
    with result_or_one_line(file.name):
        load_config(EvaluateConfig, str(file))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(value):
    floats = [name for name, kind in field_types(DistillConfig) if kind is float or float in getattr(kind, "__args__", ())]
    assert len(floats) > 20
    for name in floats:
        with pytest.raises(InputError):
            load_config(DistillConfig, "", [f"--{name.replace('_', '-')}={value}"])


def test_lists_are_spelled_alike():
    def steps(*words: str) -> tuple[int, ...]:
        return load_config(EvaluateConfig, "", ["run", *words]).steps

    assert steps("--steps", "1", "3", "9") == (1, 3, 9)
    assert steps("--steps", "1,3,9", "--count", "20") == (1, 3, 9)
    assert steps("--steps=1,3", "--skip", "1,2") == (1, 3)
    with pytest.raises(InputError, match="what has no flag comes before the options: dd2 RUN"):
        load_config(EvaluateConfig, "", ["--steps", "1", "2", "runs/a"])
    with pytest.raises(InputError, match="false; a switch takes no value: --FIELD, or --no-FIELD"):
        load_config(EvaluateConfig, "", ["run", "--speed", "false"])


def test_labels_by_number_and_name():
    conditions = ClassLabels(4)
    with pytest.raises(InputError, match="no names of classes; give 0 to 3"):
        parse_labels(("cat",), conditions, 1)
    conditions.call(["Cat", "dog", "3", "shark, white"])
    assert parse_labels(("all",), conditions, 6, 1) == [1, 2, 3, 0, 1, 2]
    assert parse_labels(("3,cat", "DOG", "shark, white"), conditions, 5) == [3, 0, 1, 3, 3]  # digits are a number
    for entries, said in (
        (("dgo",), "did you mean dog"),
        (("4",), "0 to 3"),
        (("-1",), "0 to 3"),
        (("",), "is not a class"),
        (("x",), "they are Cat"),
        (("²",), "is not a class"),
    ):
        with pytest.raises(InputError, match=said):
            parse_labels(entries, conditions, 1)
    for names in (["a"], ["a", "b", "c", 4]):
        with pytest.raises(InputError, match="must be 4 texts"):
            conditions.call(names)  # pyright: ignore[reportArgumentType]


def test_configurations_behind_options(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("count: 0")
    assert main(["sample", "--seed", "3", str(tmp_path / "c.yaml"), "run"]) == 2
    assert "count must be at least 1, got 0" in capsys.readouterr().err
    assert main(["distill", "--seed", "3", "digits"]) == 2
    assert "comes before the options: dd2 distill CONFIG.yaml" in capsys.readouterr().err
    assert main(["distill", "--teacher", "x.yaml"]) == 2  # the value of a flag stays one
    assert "teacher x.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["generator", "two_passes", "ar_diffusion"])
@pytest.mark.parametrize(
    ("flags", "names"),
    [("--cfg-scale 7", "cfg_scale"), ("--temperature 0.1 --top-k 1", "temperature, top_k"), ("--prefix generated", "prefix")],
)
def test_settings_of_a_teacher_that_does_not_draw_are_refused(method, flags, names):
    with pytest.raises(InputError, match=f"^{names} would have no effect"):
        load_config(SampleConfig, "", ["run", "--method", method, *flags.split()])
    if names == "prefix":
        with pytest.raises(InputError, match="it is about --steps 2 or more"):
            load_config(SampleConfig, "", ["run", "--method", "teacher", *flags.split()])
    else:
        assert load_config(SampleConfig, "", ["run", "--method", "teacher", *flags.split()]).method == "teacher"
    assert load_config(SampleConfig, "", ["run", "--steps", "2", *flags.split()]).steps == 2


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--count 20", "count"),
        ("--precision auto --no-speed", "speed, precision"),
        ("--marginal dataset", "marginal"),
        ("--steps 1 2", "steps"),
        ("--teacher-at.top-k 3", "teacher_at"),
    ],
)
def test_what_is_about_runs_is_refused_with_images(flags, names):
    images = ["--images", "x", "--reference", "r"]
    assert load_config(EvaluateConfig, "", images).images == Path("x")
    with pytest.raises(InputError, match=f"^{names} would have no effect on images"):
        load_config(EvaluateConfig, "", [*images, *flags.split()])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; what was saved is whole"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out of memory (allocate 2.00 GiB)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."), "99 bytes"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    ],
)
@pytest.mark.parametrize("command", ["distill", "sample"])
def test_too_little_memory_is_one_line(monkeypatch, capsys, error, said, command):
    def fail(config: object) -> None:
        raise error

    module = sys.modules[COMMANDS[command].load()[1].__module__]
    monkeypatch.setattr(module, COMMANDS[command].function, fail)
    assert main([command, "run"] if command == "sample" else [command]) == 1
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert ("--csd.batch" in line and "--loop.recompute" in line and "dd2 plan" in line) == (command == "distill")


def test_other_errors_keep_their_traceback(monkeypatch):
    from dd2.commands import sample

    def fail(config: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(sample, "sample", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["sample", "run"])


def test_what_the_system_refuses():
    assert "the disk is full (f)" in system_said(OSError(errno.ENOSPC, "No space left on device", "f"))
    assert "no permission (Read-only file system: f)" in system_said(OSError(errno.EROFS, "Read-only file system", "f"))
    assert system_said(OSError(errno.EIO, "Input/output error", "f")).startswith("Input/output error: f")
    assert memory_said(MemoryError(), None) == "out of memory; what was saved is whole"


LIMITED = """
import resource, sys
import torch
from dd2.cli import main
torch.ones(64, 64) @ torch.ones(64, 64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.e2e
def test_a_real_process_without_memory_leaves_nothing_half_written(tmp_path):
    """Drawing 40,000 images at a time in 256 MiB: exit code 1, one line, no file."""
    command = ["distill", "digits", "--teacher-samples", "60000", "--sample-batch", "60000", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("dd2: out of memory")
    assert "Traceback" not in done.stderr
    assert not [file for file in (tmp_path / "run").rglob("*") if file.name.endswith((".tmp", ".dd2-partial", ".dd2-old"))]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", ""], "--images is empty; is a variable of the shell not set"),
        (["--images="], "--images is empty"),
        (["--images", "x", "--reference", ""], "--reference is empty"),
        (["run", "--images", "x", "--reference", "r"], "the run run would have no effect on images"),
        (["run", "--prefix", "generated"], "prefix would have no effect, as steps are 1"),
        (["run", "--epsilon", "0.01"], "epsilon would have no effect, as path_length is 0"),
        (["run", "--allow-duplicates"], "allow_duplicates would have no effect"),
        (["r\udce9n"], "is no UTF-8"),
    ],
)
def test_evaluations_that_would_not_do_what_they_say(words, said):
    with pytest.raises(InputError, match=said):
        load_config(EvaluateConfig, "", words)


def test_the_empty_text_is_a_default_of_some_fields(tmp_path):
    assert load_config(DistillConfig, "", ["--captions", "", "--stage1="]).captions == ""
    assert refusal(tmp_path, "out: ''").startswith("out is empty")


def test_names_that_are_other_numbers_are_told_apart(capsys):
    conditions = ClassLabels(3)
    conditions.call(["1", "2", "3"])
    assert parse_labels(("1",), conditions, 1) == [1]
    assert "label 1 is a number here, that of the class called 2" in capsys.readouterr().err
    for text in ("+-1", "--1", "1.0", "0x1"):
        with pytest.raises(InputError):
            parse_labels((text,), conditions, 1)


@pytest.mark.e2e
@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&-", "2>/dev/full"])
def test_closed_and_full_streams_end_no_work(tmp_path, redirect):
    command = f"{sys.executable} -m dd2 reference {tmp_path}/x.npz {tmp_path}/s.npz {redirect}"
    np.savez(tmp_path / "x.npz", arr_0=np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), np.uint8))
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False)
    assert done.returncode == 0
    assert (tmp_path / "s.npz").stat().st_size > 1000
    again = f"{sys.executable} -m dd2 reference {tmp_path}/s.npz {tmp_path}/t.npz"
    done = subprocess.run(["bash", "-c", again], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds statistics already" in done.stderr
    assert main(["reference", str(tmp_path / "x.npz"), str(tmp_path / "x.npz")]) == 2  # its own images
