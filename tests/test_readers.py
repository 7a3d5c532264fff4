"""Any bytes, any array, any JSON: every reader gives a result or one line (pictures, zips and images in an .npz: test_pictures;
YAML: test_command_line; foreign checkpoints: test_foreign_file; JSON records: test_records).
"""

import gzip
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dd2.checkpoints.native import load_teacher, load_tokenizer
from dd2.checkpoints.record import RunRecord
from dd2.checkpoints.runs import embedded
from dd2.commands.bench import measured_rate
from dd2.data.idx import FILES, IMAGES, LABELS, IdxImages
from dd2.evaluation.classifier import load_classifier
from dd2.evaluation.features import FeatureNetwork
from dd2.evaluation.reference import open_reference
from dd2.files import text_lines
from dd2.teachers.filtering import Sampling
from dd2.text.captions import Captions
from dd2.training.metrics import MetricsLog
from dd2.training.store import Store
from edges import result_or_one_line
from test_records import ANY_JSON

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

DAMAGE = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=4)
"""Places and values of bytes that are changed."""


def damaged(content: bytes, damage: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(content)
    for at, value in damage:
        changed[at % len(changed)] = value
    return bytes(changed[: len(changed) - cut % len(changed)]) if cut else bytes(changed)


@FEW
@given(damage=DAMAGE, cut=st.integers(0, 30), axes=st.integers(0, 9), lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_mnists_files(tmp_path_factory, damage, cut, axes, lengths):
    folder = tmp_path_factory.mktemp("idx")
    for start in FILES.values():
        header = struct.pack(">BBBB", 0, 0, 8, axes) + struct.pack(">3I", *lengths)
        (folder / f"{start}{IMAGES}").write_bytes(damaged(gzip.compress(header + bytes(64)), damage, cut))
        (folder / f"{start}{LABELS}").write_bytes(
            gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, lengths[0]) + bytes(lengths[0]))
        )
    with result_or_one_line(str(folder)):
        images, labels = IdxImages(folder, 8).batch("train", 2, torch.Generator())
        assert (images.shape, labels.shape) == ((2, 1, 8, 8), (2,))


ARRAYS = st.sampled_from(
    [
        np.zeros(4),
        np.zeros(3),
        np.zeros((4, 1)),
        np.eye(4),
        -np.eye(4),
        np.eye(3),
        np.zeros(0),
        np.array(["a"] * 4),
        np.full(4, np.nan),
        np.full((4, 4), np.inf),
        np.zeros(4, complex),
        np.zeros(4, bool),
        np.array("{}"),
        np.array('{"features_digest": 3}'),
        np.array("[1]"),
        np.zeros((0, 0)),
        np.zeros((2, 8, 8, 3), np.uint8),
    ]
)


@FEW
@given(
    arrays=st.dictionaries(st.sampled_from(["mu", "sigma", "mu_s", "sigma_s", "described", "arr_0"]), ARRAYS, max_size=5),
    damage=DAMAGE,
)
def test_statistics_of_a_reference(tmp_path_factory, arrays, damage):
    folder = tmp_path_factory.mktemp("stats")
    np.savez(folder / "plain.npz", **arrays)
    (folder / "x.npz").write_bytes(damaged((folder / "plain.npz").read_bytes(), damage, 0))
    network = FeatureNetwork("mean", "0", lambda images: {"pool": images.flatten(1)[:, :4]})
    for name in ("plain.npz", "x.npz"):
        with result_or_one_line(str(folder / name)):
            found = open_reference(folder / name, network, torch.device("cpu"), folder / "cache", 4)
            for fit in found.fits.values():
                assert torch.isfinite(fit.mean).all()
                assert torch.equal(fit.covariance.isfinite().all(), torch.tensor(True))


@FEW
@given(content=st.binary(max_size=80), damage=DAMAGE, cut=st.integers(0, 50))
def test_caption_features(tmp_path_factory, content, damage, cut):
    file = tmp_path_factory.mktemp("captions") / "c.safetensors"
    old = {"features": torch.ones(2, 4, 3), "mask": torch.ones(2, 4, dtype=torch.uint8)}
    for whole, metadata in (
        (old, {}),
        ({"features": torch.ones(3, 2), "counts": torch.tensor([1, 2], dtype=torch.int32)}, {"length": "4"}),
    ):
        save_file(whole, file, metadata)
        for changed in (content, damaged(file.read_bytes(), damage, cut)):
            file.write_bytes(changed)
            with result_or_one_line(file.name):
                assert len(Captions.load(file)[torch.tensor([0])]) == 1


@FEW
@given(content=st.binary(max_size=80))
def test_text_files(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_bytes(content)
    with result_or_one_line(file.name):
        lines = text_lines(file, "captions", "give a text file")
        assert lines
        assert not any("\n" in line or "\r" in line for line in lines)


@FEW
@given(content=st.binary(max_size=120), rows=st.lists(ANY_JSON, max_size=4))
def test_a_log_gives_its_whole_rows(tmp_path_factory, content, rows):
    file = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    kept = {"stage": "csd", "step": 3, "x": 1.5}
    lines = [json.dumps(kept).encode(), content.replace(b"\n", b""), *(json.dumps(row).encode() for row in rows), b'{"stage": "c']
    file.write_bytes(b"\n".join(lines))
    found = MetricsLog(file).rows()
    assert found[0] == kept
    assert all(isinstance(row["stage"], str) and isinstance(row["step"], int) for row in found)


@FEW
@given(damage=DAMAGE, cut=st.integers(0, 60))
def test_arrays_on_disk(tmp_path_factory, damage, cut):
    folder = tmp_path_factory.mktemp("store")
    Store.filled(folder, 4, 4, 4, lambda rows: {"x": rows.float()}, "x", "row")
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(damaged(file.read_bytes(), damage, cut))
    with result_or_one_line(file.name):
        assert Store.existing(folder).load("x").tolist() == [0, 1, 2, 3]  # what is given is what was written


@FEW
@given(
    value=ANY_JSON, key=st.sampled_from(["kind", "family", "config", "class_names", "depth", "heads", "rows", "whole", "dropout"])
)
@pytest.mark.parametrize("model", ["teacher", "classifier", "tokenizer"])
def test_descriptions_of_models(tmp_path_factory, model, value, key):
    folder = tmp_path_factory.mktemp("model") / "m"
    source = embedded("teacher") / "tokenizer" if model == "tokenizer" else embedded(model)
    shutil.copytree(source, folder)
    described = json.loads((folder / "config.json").read_text())
    if key == "whole":
        described = value
    elif key in ("depth", "heads", "rows", "dropout"):
        described["config"][key] = value
    else:
        described[key] = value
    (folder / "config.json").write_text(json.dumps(described))
    with result_or_one_line(str(folder)):
        {"teacher": load_teacher, "classifier": load_classifier, "tokenizer": load_tokenizer}[model](folder)


@FEW
@given(
    content=st.binary(max_size=100), damage=DAMAGE, cut=st.integers(0, 3000), kind=st.sampled_from(["bytes", "damage", "ints"])
)
def test_weights_of_models(tmp_path_factory, content, damage, cut, kind):
    folder = tmp_path_factory.mktemp("weights") / "m"
    shutil.copytree(embedded("classifier"), folder)
    file = folder / "model.safetensors"
    if kind == "ints":
        classifier = load_classifier(folder)
        save_file({name: tensor.round().to(torch.int8) for name, tensor in classifier.state_dict().items()}, file)
    else:
        file.write_bytes(content if kind == "bytes" else damaged(file.read_bytes(), damage, cut))
    with result_or_one_line(str(folder)):
        load_classifier(folder)
        assert kind != "ints"


@FEW
@given(
    value=ANY_JSON,
    key=st.sampled_from([*RunRecord.__dataclass_fields__, "whole"]),
    inner=st.sampled_from([*Sampling().described()]),
)
def test_a_runs_record(tmp_path_factory, value, key, inner):
    run = tmp_path_factory.mktemp("run")
    RunRecord("distill", "digits", "", Sampling()).write(run)
    found = json.loads((run / "run.json").read_text())
    found["sampling"][inner] = value
    for changed in (value if key == "whole" else {**json.loads((run / "run.json").read_text()), key: value}, found):
        (run / "run.json").write_text(json.dumps(changed))
        with result_or_one_line(str(run)):
            assert isinstance(RunRecord.read(run), RunRecord)


@FEW
@given(value=ANY_JSON, key=st.sampled_from(["bench", "rows", "machine", "whole"]))
def test_rates_of_a_machine(tmp_path_factory, value, key):
    file = tmp_path_factory.mktemp("rates") / "r.json"
    whole = {
        "bench": "train",
        "machine": {"device": "x"},
        "rows": [{"precision": "float32", "model": "a", "gflops_per_second": 3.0}],
    }
    file.write_text(json.dumps(value if key == "whole" else {**whole, key: value}))
    with result_or_one_line(file.name):
        assert measured_rate(file, "a", "float32")[0] == 3e9
