"""Drawing in half precision: which weights change, what stays float32, and that the images are the same but for rounding."""

import numpy as np
import pytest
import torch
from torch import nn

from dd2.checkpoints.native import load_generator, save_generator
from dd2.checkpoints.runs import open_teacher
from dd2.errors import InputError
from dd2.evaluation.likelihood import teacher_nll
from dd2.generator import Generator
from dd2.pipeline import OneStepPipeline
from dd2.precision import Linear, fast_bfloat16, in_precision, pick_precision
from dd2.sampling import Ways
from dd2.student import Student
from dd2.teachers.filtering import Sampling
from models import TINY_HEAD, tiny_teacher, tiny_var

CPU = torch.device("cpu")
HALF = torch.bfloat16


def ways_of(teacher) -> Ways:
    student = Student.from_teacher(teacher, TINY_HEAD).eval().requires_grad_(False)
    nn.init.normal_(student.head.output.weight, std=0.1)
    generator = Generator.of(student, teacher)
    return Ways(generator, teacher, Sampling(), generator)


@pytest.mark.parametrize("make", [tiny_teacher, tiny_var])
def test_every_way_draws_in_half_precision_close_to_float32(make):
    teacher = make()
    ways = ways_of(teacher)
    lowered = ways.in_precision(HALF)
    cond, seeds = torch.tensor([0, 1, 2, 1]), range(4)
    for name in ("one_step", "by_teacher", "ar_diffusion"):
        tokens, whole = (getattr(w, name)()(cond, seeds) for w in (lowered, ways))
        assert tokens.dtype == torch.float32
        images = lowered.decode(tokens, cond)
        assert images.dtype == torch.float32
        # One code chosen otherwise changes all that follow, so the tokens themselves are compared in one step only.
        if name == "one_step":
            assert 0 < (tokens - whole).abs().max() < 0.1 * whole.abs().max()
        exact = ways.decode(tokens, cond)
        assert (images - exact).abs().mean() < 0.02 * exact.abs().mean() + 0.01
    few = lowered.few_steps(3)(cond, seeds)
    assert torch.isfinite(lowered.decode(few, cond)).all()


@pytest.mark.parametrize("make", [tiny_teacher, tiny_var])
def test_weights_of_products_are_lowered_and_nothing_else_is_copied(make):
    teacher = make()
    lowered = teacher.in_precision(HALF)
    types = {type(part): part.weight.dtype for part in lowered.backbone.modules() if hasattr(part, "weight")}
    assert types[nn.Linear] == HALF
    assert set(types.values()) == {HALF, torch.float32}
    assert lowered.output is teacher.output  # logits are float32
    assert lowered.tokenizer.codebook.dtype == torch.float32
    before, after = (dict(part.named_parameters()) for part in (teacher, lowered))
    shared = {name for name in before if after[name] is before[name]}
    assert {name for name in before if after[name].dtype == torch.float32} == shared
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    assert teacher.in_precision(torch.float32).backbone is teacher.backbone


def test_float32_under_ways_is_float32():
    ways = ways_of(tiny_teacher())
    cond = torch.tensor([0, 1])
    same = ways.in_precision(torch.float32)
    assert torch.equal(same.one_step()(cond, [0, 1]), ways.one_step()(cond, [0, 1]))


def test_choosing():
    assert pick_precision("float32", CPU) == torch.float32
    assert pick_precision("bfloat16", CPU) == HALF
    assert pick_precision("auto", CPU) == (HALF if fast_bfloat16(CPU) else torch.float32)
    with pytest.raises(InputError, match="float16 is for CUDA"):
        pick_precision("float16", CPU)
    with pytest.raises(InputError, match="precision must be"):
        pick_precision("int8", CPU)  # pyright: ignore[reportArgumentType]


def test_two_rows_are_multiplied_as_any_others():
    torch.manual_seed(0)
    for bias in (True, False):
        layer = Linear(5, 7, bias=bias)
        x = torch.randn(2, 1, 5)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(layer(x[:1]), expected[:1])
        assert layer(x).requires_grad


def test_parts_that_compute_in_their_own_way_are_left_alone():
    class Own(nn.Linear):
        pass

    class Network(nn.Sequential):
        @property
        def float32_parts(self):
            return (self[4],)

    network = Network(nn.Linear(2, 2), Own(2, 2), nn.LayerNorm(2), nn.Conv2d(1, 1, 1), nn.Linear(2, 2))
    found = in_precision(network, HALF)
    assert [part.weight.dtype for part in found] == [HALF, torch.float32, torch.float32, HALF, torch.float32]  # pyright: ignore
    assert found[1].weight is network[1].weight


def test_a_folder_in_half_precision_is_drawn_from_in_either(tmp_path):
    ways = ways_of(tiny_teacher())
    save_generator(tmp_path / "g", ways.generator, HALF)
    assert all(p.dtype == torch.float32 for p in load_generator(tmp_path / "g").student.parameters())
    low, high = (OneStepPipeline.from_pretrained(tmp_path / "g", device="cpu", dtype=name) for name in ("bfloat16", "float32"))
    assert (low.dtype, high.dtype) == (HALF, torch.float32)
    assert {p.dtype for p in low.generator.student.parameters()} == {torch.float32}  # what it was given, to save or to train
    images = [pipeline([0, 1, 2], [3, 4, 5], output_type="np").images for pipeline in (low, high)]
    assert np.asarray(images[0]).dtype == np.float32
    assert 0 < np.abs(np.subtract(*images)).mean() < 0.025


def test_code_of_the_users_is_left_in_float32():
    ways = ways_of(tiny_teacher())
    assert ways.in_precision(HALF).precision == HALF
    for part in ("teacher", "generator"):
        teacher = tiny_teacher()
        teacher.code = "my_model:teacher"
        own = Ways(Generator.of(ways.generator.student, teacher), tiny_teacher()) if part == "generator" else ways_of(teacher)
        assert own.in_precision(HALF) is own


def test_lowering_changes_nothing_of_the_original():
    teacher = tiny_var()
    strides = {name: p.stride() for name, p in teacher.tokenizer.named_parameters()}
    for dtype in (torch.float32, HALF):
        assert teacher.tokenizer.in_precision(dtype).largest_activation == teacher.tokenizer.largest_activation
        assert {name: p.stride() for name, p in teacher.tokenizer.named_parameters()} == strides


def test_the_digits_teacher_in_half_precision_draws_what_it_finds_as_probable():
    """NLL of samples of either precision under the float32 teacher: the same within the spread of 300 images."""
    teacher = open_teacher("digits", CPU)
    cond = teacher.conditions.default(300, CPU)
    nll = []
    for ways in (whole := ways_of(teacher), whole.in_precision(HALF)):
        tokens = ways.by_teacher()(cond, range(300))
        nll.append(teacher_nll(teacher, teacher.ids(tokens), cond))  # pyright: ignore
    spread = nll[0].std() / 300**0.5
    assert abs(nll[0].mean() - nll[1].mean()) < 3 * spread
