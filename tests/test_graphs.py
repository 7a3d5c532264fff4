"""dd2 export --format torch and onnx: graphs that compute what the generator does, and run where dd2 and torch are not."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dd2.checkpoints.native import load_generator
from dd2.cli import main
from dd2.errors import NumericalError
from dd2.shipping import graph
from dd2.shipping.graph import OnePass, run_onnx, write_graph
from models import HANG, tiny_mar, tiny_teacher, tiny_text, tiny_var
from shipped import NAMES, tiny_generator, tiny_package

FAMILIES = [
    (tiny_teacher, False),
    (tiny_teacher, True),
    (tiny_var, False),
    (tiny_var, True),
    (tiny_mar, False),
    (tiny_text, False),
]


@pytest.mark.parametrize(("make", "codes"), FAMILIES)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_graph_computes_what_the_network_does(make, codes, kind, tmp_path):
    generator = tiny_generator(make(), codes=codes)
    file = tmp_path / ("g.pt2" if kind == "torch" else "g.onnx")
    assert write_graph(file, generator, kind) < 1e-4
    run = torch.export.load(file).module() if kind == "torch" else run_onnx(file)
    one_pass = OnePass(generator)
    for count in (1, 2, 7):
        inputs = one_pass.example(count, seed=50 + count)
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), one_pass(*inputs), atol=1e-4, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_its_images_are_those_of_the_pipeline():
    """Noise, condition and range are what its description says."""
    generator = tiny_generator(tiny_teacher())
    noise, labels = OnePass(generator).example(4, 0)
    with torch.no_grad():
        tokens = generator.student.as_generator(noise, labels)
        expected = generator.decode(tokens, labels).clamp(-1, 1)
    torch.testing.assert_close(OnePass(generator)(noise, labels), expected)
    assert noise.shape == (4, 16, 4)
    assert abs(float(OnePass(generator).example(500, 1)[0].std()) - 1) < 0.02


def test_onnx_runs_without_torch_and_without_dd2(tmp_path):
    folder = tiny_package(tmp_path / "p", codes=True)
    assert main(["export", str(folder), str(tmp_path / "m.onnx"), "--format", "onnx"]) == 0
    one_pass = OnePass(load_generator(folder))
    noise, labels = one_pass.example(5, 9)
    np.savez(tmp_path / "in.npz", noise=noise, labels=labels)
    code = (
        "import json, sys, numpy as np, onnxruntime\n"
        "session = onnxruntime.InferenceSession('m.onnx', providers=['CPUExecutionProvider'])\n"
        "with np.load('in.npz') as given:\n"
        "    images, = session.run(None, {name: given[name] for name in ('noise', 'labels')})\n"
        "np.save('out.npy', images)\n"
        "about = json.loads(session.get_modelmeta().custom_metadata_map['dd2'])\n"
        "print(json.dumps([about['class_names'], about['inputs'], 'torch' in sys.modules, 'dd2' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=True)
    inputs = {"noise": ["batch", 16, 4], "labels": ["batch"]}
    assert json.loads(done.stdout) == [list(NAMES), inputs, False, False]
    with torch.no_grad():
        expected = one_pass(noise, labels).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-4)


@pytest.mark.parametrize(("kind", "dtype"), [("torch", "bfloat16"), ("onnx", "float16")])
def test_half_precision(kind, dtype, tmp_path):
    folder = tiny_package(tmp_path / "p")
    whole, half = (tmp_path / f"{name}{graph.ENDINGS[kind]}" for name in ("whole", "half"))
    assert main(["export", str(folder), str(whole), "--format", kind]) == 0
    assert main(["export", str(folder), str(half), "--format", kind, "--dtype", dtype]) == 0
    assert half.stat().st_size < whole.stat().st_size
    run = torch.export.load(half).module() if kind == "torch" else run_onnx(half)
    one_pass = OnePass(load_generator(folder))
    inputs = one_pass.example(6, 3)
    with torch.no_grad():
        apart = (run(*inputs) - one_pass(*inputs)).abs()
    assert run(*inputs).dtype == torch.float32
    assert 0 < apart.mean() < 0.05


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    generator = tiny_generator(tiny_teacher())
    for value in (0.3, math.nan):
        monkeypatch.setattr(
            graph, "_run_torch", lambda file, value=value: lambda noise, labels: torch.full((len(labels), 1, 16, 16), value)
        )
        with pytest.raises(NumericalError, match="nothing was written"):
            write_graph(tmp_path / "g.pt2", generator, "torch")
        assert list(tmp_path.iterdir()) == []


def test_bad_input(tmp_path, capsys):
    folder = tiny_package(tmp_path / "p")
    (tmp_path / "there.onnx").write_text("x")
    for words, said in (
        (["a.pt2"], "--format folder writes a folder"),
        (["a.onnx", "--format", "torch"], "must end in .pt2"),
        (["a", "--format", "onnx"], "must end in .onnx"),
        (["a.onnx", "--format", "onnx", "--dtype", "bfloat16"], "no convolution in bfloat16"),
        (["a.pt2", "--format", "torch", "--with-teacher"], "are about --format folder"),
        (["there.onnx", "--format", "onnx"], "exists"),
        (["a.pt2", "--format", "torch", "--step", "best"], "keeps no checkpoints"),
        (["no/way/a.pt2", "--format", "torch", "--average", "none"], "keeps no checkpoints"),
    ):
        out = tmp_path / words[0]
        assert main(["export", str(folder), str(out), *words[1:]]) == 2, words
        assert said in capsys.readouterr().err
        assert out.name == "there.onnx" or not out.exists()


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch, capsys):
    folder: Path = tiny_package(tmp_path / "p")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(folder), str(tmp_path / "a.onnx"), "--format", "onnx"]) == 2
    assert 'pip install "dd2[onnx]"' in capsys.readouterr().err
