"""README.md's commands: what needs no data-centre GPU is run, in its order, as a newcomer types it; the rest must parse."""

import re
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dd2.cli import COMMANDS, main
from dd2.config import load_config, positional

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = {
    "distill": shlex.split(
        "--tune.iterations 2 --csd.iterations 2 --csd.validation 8 --teacher-samples 256 --loop.preview-every 0"
    ),
    "evaluate": shlex.split("--count 100 --metrics.kid-subsets 2 --metrics.halves 2 --no-speed"),
    "sample": shlex.split("--count 20"),
    "bench": shlex.split("--repeats 1"),
    "align-decoder": shlex.split("--decoder.iterations 2 --decoder.batch 8 --decoder.prime 64 --loop.preview-every 0"),
}
"""What makes the README's commands short; flags win."""
REGRESS = shlex.split("--regress.iterations 2 --regress.guidance-iterations 2 --regress.pairs 64")
"""And those of digits.yaml, which starts from the ODE."""


def block(heading: str) -> list[list[str]]:
    """The dd2 commands of the first shell block under a heading."""
    text = README.split(f"\n## {heading}\n")[1]
    found = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert found
    return commands(found[1])


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    parsed = [shlex.split(part) for line in lines for part in re.split(r"\s#\s", line)[0].split("&&") if "<" not in part]
    return [words[words.index("dd2") + 1 :] for words in parsed if "dd2" in words and words[0] in ("dd2", "torchrun")]


@pytest.mark.e2e
def test_the_commands_of_use(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_features.py").write_text("def inception(images):\n    return images.mean(-1).flatten(1)[:, ::4]\n")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for index in range(30):
            Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save("one.png")
            archive.write("one.png", f"class{index % 2}/{index}.png")
    seen = []
    for name, *rest in block("Use"):
        if name == "demo":  # `dd2 demo` is dd2 distill digits and dd2 evaluate; tests/test_main_job.py runs it
            assert main(["distill", "digits", "--out", "runs/demo", *SHORT["distill"], *REGRESS]) == 0
            assert main(["evaluate", "runs/demo", *SHORT["evaluate"]]) == 0
            continue
        short = [] if "--images" in rest else SHORT.get(name, [])
        short = [*short, *REGRESS] if "configs/digits.yaml" in rest else short
        assert main([name, *rest, *short]) == 0, f"{name} {rest}: {capsys.readouterr().err}"
        seen.append(name)
    assert {"distill", "evaluate", "sample", "report", "export"} <= set(seen)
    assert Path("shipped/model.safetensors").is_file()
    assert Path("both.html").is_file()
    names: dict = {}
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    exec(code[1], names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 3


def test_commands_that_need_hardware_or_data_parse(tmp_path, monkeypatch):
    """Every `dd2` command of the README and of docs/ that is not run above: its fields exist, its values fit."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "src" / "dd2" / "configs", tmp_path / "configs")
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    checked = 0
    for text in (shell for page in pages for shell in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)):
        for words in commands(text):
            name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
            rest = words[len(name.split()) :]
            config_class, _ = COMMANDS[name].load()
            packaged = rest[0] if rest[:1] in (["digits"], ["digits_paper"]) and not positional(config_class) else ""
            yaml = next((word for word in rest if word.endswith(".yaml")), packaged)
            load_config(config_class, yaml, [word for word in rest if word != yaml], f"dd2 {name}")
            checked += 1
    assert checked > 25


def test_what_is_said_of_the_code_is_there():
    for path in re.findall(r"\]\((src/[^)]+|docs/[^)]+|[A-Z]+\.md)\)", README):
        assert (ROOT / path).exists(), path
    tree = re.search(r"```text\nsrc/dd2/\n(.*?)```", README, re.DOTALL)
    assert tree
    named = {word.rstrip("/") for line in tree[1].splitlines() for word in line[:34].split()}
    assert named == {word for word in named if (ROOT / "src" / "dd2" / word).exists()}


PAGES = [*ROOT.glob("*.md"), *(page for folder in ("docs", "tests") for page in ROOT.glob(f"{folder}/**/*.md"))]


@pytest.mark.parametrize("page", sorted(PAGES), ids=str)
def test_lines_of_markdown_wrap(page):
    code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        code ^= line.startswith("```")
        plain = not code and not line.startswith(("|", "    ")) and "http" not in line
        assert not plain or len(line) <= 130, f"{page.name}:{number}"
