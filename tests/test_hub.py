"""Models to the Hub and back, through a stand-in of its API: every call is a process of its own, as users have it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hub import TOKEN, Hub
from models import HANG


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def dd2(hub: Hub, cache: Path, *words: object, token: str = TOKEN, python: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", python] if python else [sys.executable, "-m", "dd2", *map(str, words)]
    environment = {**os.environ, **hub.environment(cache, token)}
    return subprocess.run(command, env=environment, cwd=cache.parent, capture_output=True, text=True, timeout=HANG, check=False)


def test_a_model_goes_to_the_hub_and_comes_back(folder, hub, tmp_path):
    pushed = dd2(
        hub, tmp_path / "mine", "push", folder, "me/ants", "--private", "--with-teacher", "--license", "mit", "--datasets", "me/x"
    )
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.url}/me/ants/commit/" in pushed.stdout
    repository = hub.repositories["me/ants"]
    assert repository.private
    commit, tree = repository.at("main")
    sent = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert tree.keys() == sent | {".gitattributes"}
    assert tree["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"license: mit" in tree["README.md"]
    assert b'from_pretrained("me/ants")' in tree["README.md"]
    drawn = dd2(hub, tmp_path / "theirs", "sample", "me/ants", "--count", 6, "--steps", 3, "--out", "a.npz")
    assert drawn.returncode == 0, drawn.stderr
    assert dd2(hub, tmp_path / "mine", "sample", folder, "--count", 6, "--steps", 3, "--out", "b.npz").returncode == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert not any("pipeline.py" in request for request in hub.requests)  # no code comes along
    code = (
        "from dd2 import OneStepPipeline\n"
        f"p = OneStepPipeline.from_pretrained('me/ants', revision='{commit}', device='cpu', local_files_only=True)\n"
        "print(p('bee').images[0].size, p.max_inference_steps)"
    )
    before = len(hub.requests)
    offline = dd2(hub, tmp_path / "theirs", python=code)
    assert offline.stdout.strip() == "(16, 16) 17", offline.stderr
    assert len(hub.requests) == before


def test_a_branch_holds_another_state(folder, hub, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"class_names": ["dog", "elk", "fox"]}))
    assert dd2(hub, tmp_path / "c", "push", folder, "me/ants").returncode == 0
    assert dd2(hub, tmp_path / "c", "push", other, "me/ants", "--revision", "v2").returncode == 0
    code = (
        "from dd2 import OneStepPipeline\n"
        "for revision in (None, 'v2'):\n"
        "    print(OneStepPipeline.from_pretrained('me/ants', revision, device='cpu').id2label[0])"
    )
    assert dd2(hub, tmp_path / "d", python=code).stdout.split() == ["ant", "dog"]


def test_refusals_are_one_line(folder, hub, tmp_path):
    assert dd2(hub, tmp_path / "c", "push", folder, "me/ants").returncode == 0
    hub.repositories["me/ants"].gated = True
    cases = [
        (["sample", "me/nothing"], TOKEN, "there is no such repository, or it is private"),
        (["sample", "me/ants"], TOKEN, "its owner lets in only whom they know"),
        (["push", folder, "me/bees"], "wrong", "the Hub refuses the token"),
        (["push", folder, "bees"], TOKEN, "must be named owner/name"),
        (["push", folder, "me/a--b"], TOKEN, "a repository is named owner/name"),
        (["push", tmp_path / "none", "me/bees"], TOKEN, "does not exist"),
        (["push", folder, "me/bees", "--license", "mine"], TOKEN, "short name"),
    ]
    for number, (words, token, said) in enumerate(cases):
        found = dd2(hub, tmp_path / f"cache{number}", *words, token=token)
        assert found.returncode == 2, (words, found.stderr)
        assert said in found.stderr
        assert "Traceback" not in found.stderr
        assert len(found.stderr.strip().splitlines()[-1]) < 400
    empty = "from dd2 import OneStepPipeline\nOneStepPipeline.from_pretrained('me/ants', revision='v9')"
    hub.repositories["me/ants"].gated = False
    assert "it has no such revision" in dd2(hub, tmp_path / "e", python=empty).stderr
    hub.repositories["me/ants"].commit({"README.md": b"# nothing"}, "main")
    assert "holds no generator" in dd2(hub, tmp_path / "f", "sample", "me/ants").stderr


def test_a_hub_that_is_not_there(folder, tmp_path):
    with Hub() as hub:
        pass
    for words, said in (("sample me/ants", "was not reached"), (f"push {folder} me/ants", "cannot be written")):
        found = dd2(hub, tmp_path / "cache", *words.split())
        assert found.returncode == 2, found.stderr
        assert said in found.stderr
        assert "Traceback" not in found.stderr


def test_without_the_library_the_extra_is_named(folder, tmp_path, monkeypatch, capsys):
    from dd2.cli import main

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["push", str(folder), "me/ants"]) == 2
    assert 'pip install "dd2[hub]"' in capsys.readouterr().err
    assert main(["sample", "me/ants", "--out", str(tmp_path / "a.png")]) == 2
    assert 'pip install "dd2[hub]"' in capsys.readouterr().err


def test_diffusers_loads_a_package(folder, tmp_path):
    """As its own pipeline, once it may run the code that lies in the folder."""
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra diffusers)")
    code = (
        "import numpy as np, torch\n"
        "from diffusers import DiffusionPipeline\n"
        "from dd2 import OneStepPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "of = lambda: torch.Generator().manual_seed(1)\n"
        "theirs = pipe(['bee', 0], generator=of(), num_inference_steps=2, output_type='np').images\n"
        f"ours = OneStepPipeline.from_pretrained({str(folder)!r}, device='cpu', dtype='float32')\n"
        "ours = ours(['bee', 0], generator=of(), num_inference_steps=2, output_type='np').images\n"
        "assert np.array_equal(theirs, ours)\n"
        "assert pipe.to(torch.bfloat16)(1).images[0].size == (16, 16)\n"
        "print('same')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    assert found.stdout.strip().endswith("same"), found.stderr
