"""Other people's files: what is no checkpoint is named in one line, whatever its bytes."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dd2.checkpoints.foreign import Origin, read_state, take
from dd2.checkpoints.foreign_file import read_file
from dd2.cli import main
from dd2.errors import InputError


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_file(path, "cpu")
    text = str(error.value)
    assert text.count("\n") == 0
    assert str(path) in text
    assert "weights_only" not in text  # words of the library, not ours
    return text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: its download has failed"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"  <HTML>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-lfs pointer"),
        (b"PK\x03\x04 and no more", "cut off or damaged"),
        (b"\x80\x02.", "cut off or damaged"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, capsys, content, said):
    file = tmp_path / "model.pth"
    file.write_bytes(content)
    assert said in refused(file)
    assert main(["inspect", str(file)]) == 2
    assert said in capsys.readouterr().err


def test_programs_and_whole_modules_are_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    assert "TorchScript program" in refused(tmp_path / "script.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "it holds a torch.nn.modules.linear.Linear" in refused(tmp_path / "module.pth")


def test_folders_say_what_is_in_them(tmp_path):
    assert "is a folder; give a file" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "such as pytorch_model.bin" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "gone.pth")


def test_safetensors_are_known_by_their_content(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.bin")
    assert torch.equal(read_file(tmp_path / "model.bin", "cpu")["a"], torch.ones(2))
    assert read_file(tmp_path / "model.bin", "meta")["a"].shape == (2,)
    whole = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-3])
    assert "cut off or damaged" in refused(tmp_path / "short.safetensors")


STARTS = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q", b"\x0a" + 7 * b"\0" + b"{"]


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200), start=st.sampled_from(STARTS))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, start):
    for name in ("any.pth", "any.safetensors"):
        file = tmp_path_factory.mktemp("bytes") / name
        file.write_bytes(start + content)
        try:
            assert isinstance(read_file(file, "cpu"), Mapping)
        except InputError:
            refused(file)


WRAPPED = [
    lambda key: f"module.{key}",
    lambda key: f"_orig_mod.module.{key}",
    lambda key: f"module._orig_mod.{key}",
    lambda key: key.replace("a.", "a._fsdp_wrapped_module._checkpoint_wrapped_module."),
    lambda key: f"model.{key}",
    lambda key: f"model.net.module.{key}",
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrappers_anywhere_in_a_name(tmp_path, wrap, capsys):
    """DDP, torch.compile, FSDP, checkpoint wrappers and Lightning, in any order; and what was dropped is said."""
    plain = {"a.0.weight": torch.ones(2), "a.1.weight": torch.zeros(2), "b": torch.ones(1)}
    torch.save({"state_dict": {wrap(key): value for key, value in plain.items()}}, tmp_path / f"{id(wrap)}.pth")
    found = read_state(tmp_path / f"{id(wrap)}.pth", (("state_dict",),))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    assert "names of tensors are read without" in capsys.readouterr().err


def test_names_that_belong_to_the_model_stay(tmp_path, capsys):
    for plain in ({"layers.0.weight": torch.ones(1), "layers.1.weight": torch.ones(1)}, {"one.weight": torch.ones(1)}):
        assert read_state(plain, ()).keys() == plain.keys()
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match=r"holds a twice, once as module\.a"):
        read_state({"a": torch.ones(1), "module.a": torch.ones(1)}, ())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.ones(2, dtype=torch.int8), "key a holds int8"),
        (torch.ones(2).to(torch.float8_e4m3fn), "key a holds float8_e4m3fn"),
        (torch.tensor([1.0, torch.nan]), "key a holds NaN"),
        (torch.ones(2, dtype=torch.bool), "key a holds bool"),
    ],
)
def test_numbers_that_are_no_weights(values, said):
    with pytest.raises(InputError, match=said):
        take({"a": values}, {"a": Origin("a")}, {"a": (2,)}, lambda key: False, "model", lambda key: "")
    halves = take({"a": torch.ones(2).half()}, {"a": Origin("a")}, {"a": (2,)}, lambda key: False, "model", lambda key: "")
    assert halves["a"].dtype == torch.float32


def test_folders_in_place_of_files(tmp_path):
    (tmp_path / "hub").mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / "hub" / name).write_bytes(b"")
    assert "2 shards of one model" in refused(tmp_path / "hub")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    assert "a distributed checkpoint of torch" in refused(tmp_path / "dcp")


def test_bytes_that_are_not_those_that_were_written(tmp_path):
    torch.save({"a": torch.ones(2000)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    at = whole.index(torch.ones(8).numpy().tobytes()) + 400
    (tmp_path / "a.pt").write_bytes(whole[:at] + bytes(100) + whole[at + 100 :])
    assert "is damaged: the checksum of" in refused(tmp_path / "a.pt")


def test_which_of_several_weights_are_taken_is_said(capsys):
    content = {"model": {"a.b": torch.zeros(1), "c": torch.ones(1)}, "ema": {"a.b": torch.ones(1), "c": torch.ones(1)}}
    assert float(read_state(content, (("model",), ("ema",)))["a.b"]) == 0
    assert "holds several sets of weights; those under model are taken, not ema" in capsys.readouterr().err


def test_tensors_that_are_not_plain():
    dense = torch.ones(2, 2)
    for values in (dense.to_sparse(), dense.to_sparse_csr(), dense.to("meta"), torch.full((2, 2), 1e300, dtype=torch.float64)):
        with pytest.raises(InputError, match="key a "):
            take({"a": values}, {"a": Origin("a")}, {"a": (2, 2)}, lambda key: False, "model", lambda key: "")


def test_files_are_known_by_content_whatever_they_are_called(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "torch.safetensors")
    assert torch.equal(read_file(tmp_path / "torch.safetensors", "cpu")["a"], torch.ones(1))
    for content in (b'{"error": "not found"}', b"<?xml version='1.0'?><Error/>", b"Entry not found"):
        (tmp_path / "x.pt").write_bytes(content)
        assert "error message of a server" in refused(tmp_path / "x.pt")
