"""Every training command on two real processes (torchrun, gloo) against one, and an evaluation that two processes share.

Several commands are one job, as starting a job is what takes the time. `dd2 distill` is in test_distributed.py.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dd2.checkpoints.native import save_teacher, save_tokenizer
from dd2.cli import main
from dd2.processes import rank, world_size
from dd2.tokenizers.vq import VQTokenizer
from models import HANG, TINY_VQ, tiny_teacher
from test_distributed import free_port, launch, rows

pytestmark = pytest.mark.e2e

WORKER = """
import json
import sys
from pathlib import Path

from dd2.cli import main
from dd2.evaluation import bank, score
from dd2.evaluation.score import Scorer
from dd2.files import weights_digest
from dd2.processes import rank
from dd2.tokenizers.train import CodeUsage
from dd2.training.loop import Trainer

told = open(Path(__file__).with_name(f"process{rank()}.jsonl"), "w")


def tell(what, value):
    print(json.dumps([what, value]), file=told, flush=True)


def run(trainer, stage, original=Trainer.run):
    seconds = original(trainer, stage)
    tell(f"weights of {stage.name}", weights_digest(*stage.modules.values()))
    return seconds


def settle(usage, embedding, *more, original=CodeUsage.settle):
    before = embedding.weight.detach().clone()
    original(usage, embedding, *more)
    tell("revived", int((embedding.weight != before).any(1).sum()))


def numbers(*given, original=Scorer.numbers):
    tell("scored", True)
    return original(*given)


def read_features(network, images, original=score.read_features):
    tell("drawn", len(images))
    return original(network, images)


Trainer.run, CodeUsage.settle, Scorer.numbers, score.read_features = run, settle, numbers, read_features
bank.SHARD = 20  # so that few images are files enough for two processes
tell("codes", [main(command) for command in json.loads(Path(sys.argv[1]).read_text())])
"""
"""One process of a job: runs the commands of a file one after another, and tells in another file what it did."""

Command = Sequence[object]
Told = list[tuple[str, Any]]
"""What one process told, in its order: a name and a value."""

EVERY = ("--loop.log-every", 1, "--loop.preview-every", 0)
FAST = ("--optim.lr", 1e-3)
"""Far enough from the start that a wrong gradient shows in the weights."""


def on_two(folder: Path, *commands: Command) -> tuple[Told, Told]:
    """Commands run one after another by one job of two processes, and what each process told; all must have ended well."""
    folder.mkdir()
    (folder / "worker.py").write_text(WORKER)
    (folder / "commands.json").write_text(json.dumps([[str(part) for part in command] for command in commands]))
    job = ("--nproc-per-node", 2, "--master-port", free_port(), folder / "worker.py", folder / "commands.json")
    process = launch(*job)
    try:
        _, errors = process.communicate(timeout=HANG)
    finally:
        if process.poll() is None:  # hung
            process.terminate()
            process.communicate()
    files = [folder / f"process{number}.jsonl" for number in (0, 1)]
    assert all(file.is_file() for file in files), errors
    first, second = ([tuple(json.loads(line)) for line in file.read_text().splitlines()] for file in files)
    for told in (first, second):  # judged by what was done, as a process may rarely abort at its end
        assert told[-1:] == [("codes", [0] * len(commands))], errors
    return first, second


def on_one(*command: object) -> None:
    """A command run by this process alone."""
    assert main([str(part) for part in command]) == 0


def assert_same_training(one: Path, two: Path, model: str) -> None:
    """Two runs logged the same numbers and ended with the same model, but for rounding; the second on two processes."""
    a, b = rows(one), rows(two)
    assert [(row.pop("stage"), row["step"]) for row in a] == [(row.pop("stage"), row["step"]) for row in b]
    for row, same in zip(a, b, strict=True):
        assert same == pytest.approx(row, rel=1e-4, abs=1e-5)
    weights, also = (load_file(run / model / "model.safetensors") for run in (one, two))
    torch.testing.assert_close(also, weights, rtol=1e-3, atol=1e-4)
    assert json.loads((two / "versions.json").read_text())["processes"] == 2


def values(told: Told, name: str) -> list[Any]:
    """All that a process told under one name."""
    return [value for what, value in told if what.startswith(name)]


SMALL_TOKENIZER = (
    *("--tokenizer.codebook-size", 32, "--tokenizer.code-dim", 4, "--tokenizer.image-size", 16, "--tokenizer.image-channels", 1),
    *("--tokenizer.channels", 8, "--tokenizer.multipliers", 1, 1, 2, "--tokenizer.res-blocks", 1),
    *("--tokenizer.z-channels", 8, "--tokenizer.groups", 4),
)


def test_tokenizers_and_what_they_revive(tmp_path):
    """Raster and multi-scale: both processes hold the same codebook, bit for bit, after codes were revived, and one has it too.

    A code is dead after three iterations without a token.
    """
    common = (
        *("train-tokenizer", *SMALL_TOKENIZER, *FAST, *EVERY, "--iterations", 8, "--batch", 2, "--accumulate", 4),
        *("--vq-loss.usage-rate", 0.5, "--vq-loss.revive-every", 3),
    )
    kinds = {"raster": (), "multi-scale": ("--patch-nums", 1, 2, 4)}
    first, second = on_two(
        tmp_path / "job", *((*common, *more, "--out", tmp_path / f"{kind} two") for kind, more in kinds.items())
    )
    assert first == second
    assert len(values(first, "weights")) == 2
    revived = values(first, "revived")
    assert len(revived) == 16
    for of_kind in (revived[:8], revived[8:]):
        assert [step for step, count in enumerate(of_kind, 1) if count] == [3, 6]
        assert max(of_kind) > 3  # so that vectors of both processes are among them
    for kind, more in kinds.items():
        on_one(*common, *more, "--out", tmp_path / f"{kind} one")
        assert_same_training(tmp_path / f"{kind} one", tmp_path / f"{kind} two", "tokenizer")


def test_teacher_and_classifier(tmp_path):
    """The classifier's batch is not shared out: each process computes all of it, so its training is that of one bit for bit."""
    save_tokenizer(tmp_path / "tokenizer", VQTokenizer(TINY_VQ))
    teacher = (
        *("train-teacher", "--tokenizer", tmp_path / "tokenizer", *FAST, *EVERY, "--token-images", 64, "--iterations", 4),
        *("--teacher.depth", 1, "--teacher.width", 16, "--teacher.heads", 2, "--batch", 64, "--accumulate", 2),
    )
    classifier = ("train-classifier", *FAST, *EVERY, "--iterations", 4, "--batch", 16, "--classifier.width", 4)
    commands = {"teacher": teacher, "classifier": classifier}
    first, second = on_two(
        tmp_path / "job", *((*command, "--out", tmp_path / f"{name} two") for name, command in commands.items())
    )
    assert first == second
    assert len(values(first, "weights")) == 2
    for name, command in commands.items():
        on_one(*command, "--out", tmp_path / f"{name} one")
        assert_same_training(tmp_path / f"{name} one", tmp_path / f"{name} two", name)
    files = [(tmp_path / run / "classifier" / "model.safetensors").read_bytes() for run in ("classifier one", "classifier two")]
    assert files[0] == files[1]


def dd1(teacher: Path) -> Command:
    """A tiny `dd2 dd1`."""
    return (
        *("dd1", "--teacher", teacher, *EVERY, "--pairs", 60, "--standardise-samples", 30, "--ode.steps", 3),
        *("--sampling.cfg-scale", "None", "--sampling.top-k", 0, "--heads.logits-steps", 2, "--heads.second-step", 1),
        *("--train.batch", 4, "--train.accumulate", 2, "--train.iterations", 4, "--train.optim.lr", 1e-3),
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher that can be distilled."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    save_teacher(folder, tiny_teacher())
    return folder


@pytest.fixture(scope="module")
def dd1_run(tmp_path_factory, teacher) -> Path:
    """A DD1 run of one process."""
    run = tmp_path_factory.mktemp("dd1") / "run"
    on_one(*dd1(teacher), "--out", run)
    return run


def test_adapt_and_dd1(tmp_path, teacher, dd1_run):
    """Stage 0 with both parts, and the baseline."""
    save_teacher(tmp_path / "official", tiny_teacher(input_layer="table"))
    adapt = (
        *("adapt", "--teacher", tmp_path / "official", *EVERY, "--adapt.fit-iterations", 4, "--adapt.sequences", 64),
        *("--adapt.iterations", 4, "--adapt.batch", 64, "--adapt.accumulate", 2, "--adapt.optim.lr", 1e-3),
    )
    two = tmp_path / "adapt two", tmp_path / "dd1 two"
    first, second = on_two(tmp_path / "job", (*adapt, "--out", two[0]), (*dd1(teacher), "--out", two[1]))
    assert first == second
    assert len(values(first, "weights")) == 3
    on_one(*adapt, "--out", tmp_path / "adapt one")
    assert_same_training(tmp_path / "adapt one", two[0], "teacher")
    assert_same_training(dd1_run, two[1], "generator")


def leaves(tree: object, name: str = "") -> dict[str, Any]:
    """The values of a JSON document by their paths."""
    if not isinstance(tree, (dict, list)):
        return {name: tree}
    below = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: value for key, part in below for path, value in leaves(part, f"{name}/{key}").items()}


def test_an_evaluation_is_drawn_by_both_and_scored_once(tmp_path, dd1_run):
    evaluate = ("--count", 60, "--batch", 20, "--steps", 1, 2, "--no-speed")
    one, two = (shutil.copytree(dd1_run, tmp_path / name) for name in ("one", "two"))
    on_one("evaluate", one, *evaluate)
    first, second = on_two(tmp_path / "job", ("evaluate", two, *evaluate))
    assert values(first, "scored") == [True]
    assert values(second, "scored") == []
    # Beside the two images by which features are checked, each bank has three files of 20: two for one, one for the other.
    drawn = [[count for count in values(told, "drawn") if count == 20] for told in (first, second)]
    assert len(drawn[0]) == 2 * len(drawn[1]) > 0
    found = [leaves(json.loads((run / "metrics.json").read_text())) for run in (one, two)]
    for numbers in found:
        assert any(path.startswith("/metrics/generator/frechet") for path in numbers)
        for path in [path for path in numbers if path.startswith("/seconds")]:
            del numbers[path]
    assert found[0].keys() == found[1].keys()
    for path, value in found[0].items():
        assert found[1][path] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), path


@pytest.mark.parametrize(
    ("left_over", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "1"}, (0, 1)),
        ({"WORLD_SIZE": "2"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (0, 1)),  # nobody to talk to
        ({"RANK": "x", "WORLD_SIZE": "", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, (1, 2)),
    ],
)
def test_only_all_of_torchruns_variables_make_a_job(monkeypatch, left_over, place):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert (rank(), world_size()) == place
