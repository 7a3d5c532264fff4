"""Lists of prompts, text encoders, features that are kept, and the folders of others' scorers."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dd2.cli import main
from dd2.data.scene_captions import captions
from dd2.errors import InputError
from dd2.teachers.conditions import CaptionLabels
from dd2.text.captions import Captions, captions_of
from dd2.text.encoder import EncoderSpec, spec_of
from dd2.text.encoders import open_encoder
from dd2.text.layouts import LAYOUTS, write_files
from dd2.text.prompts import LONGEST, Prompts, read_prompts, typed
from dd2.text.wordllama import places
from texts import tiny_flan_t5

WORDLLAMA = spec_of("wordllama", 12)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DD2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture(scope="module")
def flan_t5(tmp_path_factory) -> Path:
    return tiny_flan_t5(tmp_path_factory.mktemp("t5"))


def written(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder / name)


def test_the_formats_of_lists(tmp_path):
    text = read_prompts(written(tmp_path, "a.txt", "\ufeffA red fox \r\nsnow, at night\n"))
    assert text.texts == ("A red fox", "snow, at night")
    table = read_prompts(written(tmp_path, "a.csv", 'id,caption\n7,A red fox\n8,"snow, at night"\n'))
    listed = read_prompts(written(tmp_path, "a.json", '["A red fox", "snow, at night"]'))
    assert table.texts == listed.texts == text.texts
    assert table.digest() == listed.digest() == text.digest() != typed(["snow, at night", "A red fox"]).digest()
    styled = read_prompts(written(tmp_path, "b.json", '{"anime": ["A red fox"], "paintings": ["snow", "night"]}'))
    assert (styled.texts, styled.groups) == (("A red fox", "snow", "night"), ("anime", "paintings", "paintings"))
    mjhq = read_prompts(
        written(tmp_path, "c.json", '{"x1": {"category": "food", "prompt": "soup"}, "y2": {"category": "art", "prompt": "oil"}}')
    )
    assert (mjhq.texts, mjhq.groups, mjhq.keys) == (("soup", "oil"), ("food", "art"), ("x1", "y2"))
    line = '{"tag": "counting", "include": [{"class": "fox", "count": 2}], "prompt": "two foxes"}'
    geneval = read_prompts(written(tmp_path, "d.jsonl", f"{line}\n\n"))
    assert (geneval.texts, geneval.groups, geneval.records) == (("two foxes",), ("counting",), (line,))
    assert read_prompts("scenes").texts == tuple(caption.text for caption in captions("seen"))
    assert read_prompts("scenes-unseen").described()["prompts"] == "scenes-unseen"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "fox\n\nsnow\n", "line 2 is empty"),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
        ("a.txt", b"fox\0\n", "no text file"),
        ("a.txt", "fox\n" + "word " * 10_000, r"number 2 has 10,000 words"),
        ("a.json", "{}", "there are none"),
        ("a.json", "[]", "there are none"),
        ("a.json", "[1]", "no list of texts"),
        ("a.json", "nonsense", "not valid JSON"),
        ("a.json", '{"anime": ["fox", 3]}', "number 2 is no text"),
        ("a.jsonl", '{"prompt": "fox"}\n{"prompt": " "}\n', "number 2 is empty"),
        ("a.jsonl", '{"class": "fox"}\n', "first record has class"),
        ("a.csv", "id,name\n1,fox\n", "first record has id, name"),
        ("a.csv", "prompt\n", "there are none"),
        ("a.json", '["\\ud800 fox"]', "half a character"),
    ],
)
def test_lists_that_are_none(tmp_path, name, content, said):
    with pytest.raises(InputError, match=said) as caught:
        read_prompts(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(str(tmp_path / "none.txt"))


@given(content=st.binary(max_size=100), kind=st.sampled_from(["txt", "json", "jsonl", "csv"]))
def test_any_bytes_are_prompts_or_one_line(tmp_path_factory, content, kind):
    file = tmp_path_factory.mktemp("lists") / f"p.{kind}"
    file.write_bytes(content)
    try:
        found = read_prompts(str(file))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(0 < len(text) <= LONGEST for text in found.texts)
        assert len(found.digest()) == 64
        assert Captions.encoded(found, open_encoder(WORDLLAMA)).counts.min() >= 1


def test_wordllama_is_its_package_s_own_vectors():
    """By the numbers of a text's pieces; features do not depend on the other texts, and the empty text has one word."""
    encoder = open_encoder(WORDLLAMA)
    features, mask = encoder.encode(["A three above a SEVEN", "", "two fives and a nine in the top left of it all"])
    assert features.shape == (3, 12, 256)
    assert mask.sum(1).tolist() == [6, 1, 12]
    assert encoder.words(["two fives and a nine in the top left of it all"]) == [14]
    found = importlib.util.find_spec("wordllama")
    assert found is not None
    assert found.origin is not None
    table = load_file(Path(found.origin).parent / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
    words = table[[1, 263, 2211, 2038, 263, 9881]].float()
    torch.testing.assert_close(features[0, :6] - words, places(12, 256)[:6])
    torch.testing.assert_close(features[1, 0] - table[1].float(), places(12, 256)[0])
    between = torch.cdist(places(12, 256), places(12, 256)) + 10 * torch.eye(12)
    assert between.min() > 1  # no two places look alike
    assert torch.equal(encoder.encode(["a three above a seven"])[0][0], features[0])
    assert not features[0, 6:].any()


def test_flan_t5_is_transformers_encoder(flan_t5):
    import transformers

    encoder = open_encoder(spec_of(str(flan_t5), 6))
    assert encoder.spec.channels == 8
    features, mask = encoder.encode(["A red fox", "", "the red fox above the red snow"])
    assert mask.sum(1).tolist() == [4, 1, 6]
    theirs = transformers.T5EncoderModel.from_pretrained(flan_t5)
    ids = torch.tensor([[3, 6, 7, 1]])
    torch.testing.assert_close(features[0, :4], theirs(input_ids=ids)["last_hidden_state"][0], rtol=1e-4, atol=1e-5)
    assert encoder.words(["the red fox above the red snow"]) == [8]


def test_who_made_the_features_is_remembered(cache, flan_t5, tmp_path, capsys):
    spec = open_encoder(WORDLLAMA).spec
    found = captions_of(typed(["a three", "seven"]), spec)
    found.save(tmp_path / "f.safetensors")
    again = Captions.load(tmp_path / "f.safetensors")
    assert (again.texts, again.encoder) == (("a three", "seven"), spec)
    assert torch.equal(again.words, found.words)
    assert again.counts.tolist() == [3, 2]
    assert len(again.words) == 5  # no padding is kept
    assert again[torch.tensor([0])][0, :, -1].tolist() == [0] * 9 + [1] * 3  # words come last
    t5 = open_encoder(spec_of(str(flan_t5), 12)).spec
    with pytest.raises(InputError, match="another text encoder"):
        captions_of(str(tmp_path / "f.safetensors"), t5)
    with pytest.raises(InputError, match="is a flan-t5"):
        captions_of(typed(["a"]), spec, place=str(flan_t5))
    other = tiny_flan_t5(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="other weights than the one that this model was trained with"):
        captions_of(typed(["a"]), t5, place=str(other))
    moved = tmp_path / "moved"
    flan_t5.rename(moved)
    try:
        open_encoder.cache_clear()
        with pytest.raises(InputError, match="not on this machine"):
            captions_of(typed(["a red fox"]), t5)
        assert captions_of(typed(["a red fox"]), t5, place=str(moved)).counts.tolist() == [4]
    finally:
        moved.rename(flan_t5)
    unknown = EncoderSpec("flan-t5", length=12, channels=8)
    assert len(captions_of(typed(["a"]), unknown, place=str(flan_t5))) == 1
    with pytest.raises(InputError, match="does not say which text encoder"):
        captions_of(typed(["a"]), None)
    with pytest.raises(InputError, match="not on this machine, or damaged"):
        captions_of(typed(["a"]), spec_of("google/flan-t5-none"))
    assert not cache.exists()  # few prompts are not kept


def test_a_model_that_is_not_whole_is_refused(flan_t5, tmp_path):
    """Missing tensors and tokenizers, which the library makes up; other weights anywhere, and other tokenizers, are another
    encoder; what is stored in half precision is computed in float32.
    """
    spec = open_encoder(spec_of(str(flan_t5), 6)).spec

    def copied(name: str) -> Path:
        shutil.copytree(flan_t5, tmp_path / name)
        return tmp_path / name

    def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    last = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    part = changed(copied("part"), lambda weights: {name: value for name, value in weights.items() if name != last})
    with pytest.raises(InputError, match="lacks 1 tensors"):
        open_encoder(spec_of(str(part), 6))
    other = changed(copied("other"), lambda weights: {**weights, last: 3 * weights[last]})
    assert open_encoder(spec_of(str(other), 6)).spec.digest != spec.digest
    half = changed(copied("half"), lambda weights: {name: value.bfloat16() for name, value in weights.items()})
    assert open_encoder(spec_of(str(half), 6)).encode(["a red fox"])[0].dtype == torch.float32
    bare = copied("bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        open_encoder(spec_of(str(bare), 6))
    cut = copied("cut")
    (cut / "model.safetensors").write_bytes((flan_t5 / "model.safetensors").read_bytes()[:200])
    with pytest.raises(InputError, match="or damaged"):
        open_encoder(spec_of(str(cut), 6))


def test_lists_that_join_to_the_same_lines_are_not_the_same(cache):
    first, second = (Prompts((*texts, *map(str, range(40))), "p") for texts in (("a\nb", "c"), ("a", "b\nc")))
    assert first.digest() != second.digest()
    assert captions_of(first, WORDLLAMA).texts != captions_of(second, WORDLLAMA).texts


def test_a_damaged_file_of_kept_features_is_made_again(cache):
    prompts = Prompts(tuple(f"fox {row}" for row in range(40)), "p")
    first = captions_of(prompts, WORDLLAMA)
    (file,) = cache.iterdir()
    file.unlink()  # not written over: the features are mapped from it
    file.write_bytes(b"torn")
    again = captions_of(prompts, WORDLLAMA)
    assert torch.equal(again.words, first.words)
    assert again.digest == first.digest == Captions.load(file).digest


def test_many_prompts_are_encoded_once(cache, monkeypatch, capsys):
    prompts = Prompts(tuple(f"{'very ' * (row % 20)}red fox {row}" for row in range(40)), "mine.txt")
    first = captions_of(prompts, WORDLLAMA)
    (file,) = cache.iterdir()
    said = capsys.readouterr().err
    assert "of 40 prompts are longer than 12 positions (first: number" in said
    monkeypatch.setattr(Captions, "encoded", None)
    again = captions_of(prompts, WORDLLAMA)
    assert torch.equal(again.words, first.words)
    assert again.texts == prompts.texts
    with pytest.raises(TypeError):
        captions_of(prompts, spec_of("wordllama", 13))  # another file
    assert file.is_file()


def test_conditions_of_texts(cache):
    spec = open_encoder(WORDLLAMA).spec
    labels = CaptionLabels(12, 256, encoder=spec)
    with pytest.raises(InputError, match="give prompts"):
        _ = labels.num_labels
    known = labels.of_texts(typed(["a three above a seven", "two fives"]))
    assert known.num_labels == 2
    assert known.class_names == ("a three above a seven", "two fives")
    assert known.label("Two fives") == 1
    assert known(torch.tensor([1])).shape == (1, 12, 257)
    upgraded = CaptionLabels(12, 256, encoder=EncoderSpec("wordllama", length=12, channels=256)).of_texts(typed(["a"]))
    assert upgraded.encoder == spec  # what was unknown of the encoder is remembered from here on
    with pytest.raises(InputError, match="reads 12 positions of 8"):
        CaptionLabels(12, 8, encoder=spec)


def test_text_features_on_the_command_line(flan_t5, tmp_path, capsys):
    prompts = written(tmp_path, "p.txt", "A Red fox\nSnow\n")
    out = tmp_path / "f.safetensors"
    assert main(["text-features", "--prompts", prompts, "--out", str(out), "--text-encoder", str(flan_t5), "--length", "4"]) == 0
    made = load_file(out)
    assert made["counts"].tolist() == [4, 2]
    assert len(made["features"]) == 6
    read = Captions.load(out)
    assert read[torch.arange(2)][..., -1].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert read.texts == ("A Red fox", "Snow")
    capsys.readouterr()
    for wrong, said in (
        (["--out", tmp_path / "f.npz"], "must end in .safetensors"),
        (["--text-encoder", tmp_path / "nowhere"], "not on this machine"),
        (["--length", "-1"], "must not be negative"),
    ):
        assert main([str(a) for a in ["text-features", "--prompts", prompts, "--out", out, *wrong]]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert said in lines[-1]


def test_folders_of_others_scorers(tmp_path):
    line = '{"tag": "counting", "prompt": "two foxes"}'
    lists = {
        "captions": Prompts(("a  fox\nin snow", "snow"), "p"),
        "geneval": Prompts(("two foxes", "snow"), "p", records=(line, '{"prompt": "snow"}')),
        "hpsv2": Prompts(("fox", "snow", "night"), "p", groups=("anime", "paint/ings", "anime")),
        "mjhq": Prompts(("fox", "snow"), "p", groups=("food", "art"), keys=("../x", "y")),
    }
    names = {name: [LAYOUTS[name](prompts).name(number) for number in range(len(prompts))] for name, prompts in lists.items()}
    assert names["captions"] == ["images/0.png", "images/1.png"]
    assert names["geneval"] == ["00000/samples/0000.png", "00001/samples/0000.png"]
    assert LAYOUTS["geneval"](lists["geneval"]).name(3) == "00001/samples/0001.png"
    assert names["hpsv2"] == ["anime/00000.jpg", "paint_ings/00000.jpg", "anime/00001.jpg"]
    assert names["mjhq"] == ["food/_x.png", "art/y.png"]
    write_files(tmp_path, LAYOUTS["captions"](lists["captions"]), 3, {"seed": 0})
    assert (tmp_path / "captions.txt").read_text() == "a fox in snow\nsnow\na fox in snow\n"
    assert json.loads((tmp_path / "dd2.json").read_text()) == {"seed": 0}
    write_files(tmp_path, LAYOUTS["geneval"](lists["geneval"]), 4, {})
    assert (tmp_path / "00000" / "metadata.jsonl").read_text() == line + "\n"
    for name in ("geneval", "hpsv2", "mjhq"):
        with pytest.raises(InputError, match=f"layout {name} needs"):
            LAYOUTS[name](lists["captions"])
    for twice in (("a/b", "a:b"), ("x", "X")):
        with pytest.raises(InputError, match="two of them would be the file"):
            LAYOUTS["mjhq"](Prompts(("fox", "snow"), "p", groups=("food", "food"), keys=twice)).check()
    with pytest.raises(InputError, match="one image of each prompt"):
        LAYOUTS["hpsv2"](lists["hpsv2"]).name(3)
