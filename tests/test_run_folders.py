"""A run folder is where it lies: renamed, copied, moved with its teacher, behind links, with damaged records."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dd2.checkpoints.runs import embedded
from dd2.cli import main
from dd2.writers import open_writer

pytestmark = pytest.mark.e2e

TINY = [
    *("--teacher-samples", "64", "--tune.iterations", "1", "--tune.head-iterations", "1", "--tune.batch", "4"),
    *("--csd.iterations", "2", "--csd.k", "1", "--csd.batch", "4", "--csd.accumulate", "1", "--csd.validation", "4"),
    *("--tune.accumulate", "1", "--loop.save-every", "1", "--head.depth", "1", "--head.width", "16"),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A run and its teacher below one folder, made with relative paths."""
    root = tmp_path_factory.mktemp("original")
    shutil.copytree(embedded("teacher"), root / "t")
    before = Path.cwd()
    os.chdir(root)
    try:
        assert main(["distill", "--teacher", "t", "--out", "runs/a", *TINY]) == 0
        assert main(["evaluate", "runs/a", "--count", "20", "--no-speed"]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def root(original, tmp_path, monkeypatch) -> Path:
    """A copy of it, which the test may change; the working directory is another."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(original, tmp_path / "root"))


def times(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_a_renamed_run_goes_on_where_it_lies(root):
    (root / "runs" / "a").rename(root / "runs" / "b")
    config = root / "runs" / "b" / "config.yaml"
    (config.parent / "checkpoints" / "csd" / "00000002").rename(root / "away")
    assert main(["distill", str(config)]) == 0
    assert [folder.name for folder in (root / "runs").iterdir()] == ["b"]
    steps = [json.loads(line) for line in (config.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["stage"] == "csd"] == [1, 2]


def test_a_copy_leaves_the_original_alone(root):
    shutil.copytree(root / "runs" / "a", root / "runs" / "c")
    before = times(root / "runs" / "a")
    assert main(["distill", str(root / "runs" / "c" / "config.yaml")]) == 0
    assert times(root / "runs" / "a") == before
    assert "runs/c" in (root / "runs" / "c" / "config.yaml").read_text()


def test_another_out_is_another_run(root):
    shutil.rmtree(root / "runs" / "a" / "checkpoints" / "csd" / "00000002")
    before = times(root / "runs" / "a")
    assert main(["distill", str(root / "runs" / "a" / "config.yaml"), "--out", str(root / "d")]) == 0
    assert times(root / "runs" / "a") == before
    assert (root / "d" / "generator").is_dir()


@pytest.mark.parametrize("moved", [False, True])
def test_the_teacher_is_found_from_anywhere(original, root, moved):
    """From another working directory; and, where run and teacher moved together, from their new place."""
    where = root if moved else original
    if moved:  # the place that the record names is gone
        record = root / "runs" / "a" / "run.json"
        record.write_text(record.read_text().replace(str(original.resolve()), "/gone"))
        assert '"/gone/t"' in record.read_text()
    assert main(["sample", str(where / "runs" / "a"), "--method", "teacher", "--count", "2", "--out", "x.npz"]) == 0


def test_a_teacher_that_has_moved_is_named(root, capsys):
    config = root / "runs" / "a" / "config.yaml"
    config.write_text(config.read_text().replace(str(root), "/gone"))
    (root / "t").rename(root / "t2")
    shutil.copytree(root / "t2", root / "t3")
    content = config.read_text().splitlines()
    teacher = next(line for line in content if line.startswith("teacher:"))
    config.write_text("\n".join(content).replace(teacher, "teacher: /gone/t"))
    capsys.readouterr()
    assert main(["distill", str(config), "--teacher", str(root / "t3")]) == 2
    said = capsys.readouterr().err
    assert f"teacher was /gone/t, now {root / 't3'}; if it has moved there, say so in {config}" in said


def test_links_are_written_through(root):
    """The folder behind a link gets the new content, and the link stays, also when the run goes on."""
    run, big = root / "runs" / "a", root / "big"
    (run / "generator").rename(big)
    (run / "generator").symlink_to(big)
    shutil.rmtree(run / "checkpoints" / "csd" / "00000002")
    before = (big / "model.safetensors").stat().st_ino
    assert main(["distill", str(run / "config.yaml")]) == 0
    assert (run / "generator").is_symlink()
    assert (big / "model.safetensors").stat().st_ino != before
    assert sorted(path.name for path in root.iterdir()) == ["big", "runs", "t"]
    assert sorted(path.name for path in run.iterdir() if "generator" in path.name) == ["generator"]
    for name in ("x.npz", "x.png"):
        (root / name).symlink_to(root / "runs" / name)  # to nothing yet
        assert main(["sample", str(run), "--count", "2", "--out", str(root / name)]) == 0
        assert (root / name).is_symlink()
        assert (root / "runs" / name).stat().st_size > 0
    (root / "folder").symlink_to(root / "runs" / "pngs")
    assert main(["sample", str(run), "--count", "2", "--out", str(root / "folder")]) == 0
    assert len(list((root / "runs" / "pngs").iterdir())) == 2


def test_an_interrupted_writer_leaves_a_link(tmp_path):
    (tmp_path / "x.npz").symlink_to(tmp_path / "real.npz")
    (tmp_path / "real.npz").write_bytes(b"before")
    with pytest.raises(RuntimeError), open_writer(tmp_path / "x.npz"):
        raise RuntimeError
    assert (tmp_path / "real.npz").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.npz", "x.npz"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("run.json", ["evaluate", "RUN", "--count", "20", "--no-speed"]),
        ("seconds.json", ["evaluate", "RUN", "--count", "20", "--no-speed"]),
        ("teacher_samples/samples.json", ["evaluate", "RUN", "--count", "20", "--no-speed"]),
        ("versions.json", ["report", "RUN", "--out", "r.html"]),
        ("metrics.json", ["report", "RUN", "--out", "r.html"]),
        ("seconds.json", ["distill", "RUN/config.yaml"]),
        ("versions.json", ["distill", "RUN/config.yaml"]),
        ("teacher_samples/samples.json", ["distill", "RUN/config.yaml"]),
    ],
)
@pytest.mark.parametrize("damage", ["half", "list"])
def test_a_damaged_record_is_named(root, capsys, name, command, damage):
    run = root / "runs" / "a"
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2] if damage == "half" else b"[1, 2]")
    capsys.readouterr()
    assert main([word.replace("RUN", str(run)) for word in command]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("dd2: ")
    assert name in said


def test_a_damaged_state_is_passed_over(root, capsys):
    """The checkpoint before it is taken, with a word."""
    run = root / "runs" / "a"
    (run / "checkpoints" / "csd" / "00000002" / "state.json").write_text("[]")
    assert main(["distill", str(run / "config.yaml")]) == 0
    assert "skipped: checkpoint" in capsys.readouterr().err


def test_a_name_is_no_markup(root):
    """A run's folder, its classes and its records may hold anything; the page shows it as it stands."""
    evil = "<img src=x onerror=alert(1)>"
    run = (root / "runs" / "a").rename(root / "runs" / evil)
    versions = json.loads((run / "versions.json").read_text())
    (run / "versions.json").write_text(json.dumps({**versions, "machine": evil}))
    assert main(["evaluate", str(run), "--count", "20", "--no-speed"]) == 0
    assert main(["report", str(run), "--out", str(root / "r.html")]) == 0
    for page in ((run / "report.html").read_text(), (root / "r.html").read_text()):
        assert evil not in page
        assert "&lt;img src=x onerror=alert(1)&gt;" in page


@pytest.mark.parametrize("name", ["versions.json", "run.json"])
def test_a_run_that_lost_a_record_is_known_all_the_same(root, name):
    run = (root / "runs" / "a").rename(root / "runs" / "b")
    (run / name).unlink()
    assert main(["distill", str(run / "config.yaml")]) == 0
    assert [folder.name for folder in (root / "runs").iterdir()] == ["b"]
    assert (run / name).is_file()


def test_an_empty_configuration_is_named(root, capsys):
    config = root / "runs" / "a" / "config.yaml"
    config.write_text("")
    assert main(["distill", str(config), *TINY]) == 2
    assert f"{config} is empty, so nobody knows what this run was" in capsys.readouterr().err


def test_images_that_are_no_numbers_are_not_black(root, capsys):
    file = root / "runs" / "a" / "generator" / "model.safetensors"
    tensors = load_file(file)
    save_file({key: value * 1e20 if key.endswith(".weight") else value for key, value in tensors.items()}, file)
    assert main(["sample", str(root / "runs" / "a"), "--count", "2", "--out", "x.npz", "--precision", "float32"]) == 1
    assert "an image holds NaN or infinity" in capsys.readouterr().err
    assert not Path("x.npz").exists()


def test_sizes_that_no_weights_have(root, capsys):
    """Refused before memory is asked for them."""
    run = root / "runs" / "a"
    record = json.loads((run / "run.json").read_text())
    record["head"]["depth"] = 10**9
    (run / "run.json").write_text(json.dumps(record))
    assert main(["export", str(run), str(root / "x")]) == 2
    assert "run.json: depth 1,000,000,000 is more than generator_ema.safetensors can hold" in capsys.readouterr().err
