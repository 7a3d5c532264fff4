"""Networks over codes: the straight-through choice, the closed-form score of the guidance network, the ODE on own tokens."""

import numpy as np
import pytest
import torch
from torch import nn

from dd2.baselines.marginal import MarginalSampler
from dd2.checkpoints.native import load_generator, save_generator
from dd2.cli import main
from dd2.code_student import CodeGuidance, CodeStudent
from dd2.commands.distill_config import DistillConfig, check
from dd2.errors import InputError
from dd2.evaluation.methods import in_rounds, methods
from dd2.generator import Generator
from dd2.losses import csd_loss
from dd2.method.config import CSDConfig, NetworksConfig, RegressConfig
from dd2.method.csd import generator_loss, guidance_loss
from dd2.method.networks import sizes_over_codes
from dd2.method.regress import code_loss, regress_own_loss
from dd2.pipeline import OneStepPipeline
from dd2.sampling import Ways
from dd2.scores import velocity
from dd2.student import Drawn, HeadConfig, Student
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling
from dd2.teachers.layers import LayerStack, append_identities
from dd2.training.samples import TeacherSamples
from dd2.trajectory import OdeConfig, data_given, data_of_noise
from models import TINY_HEAD, tiny_teacher, tiny_text, tiny_var

TEACHERS = {"raster": tiny_teacher, "next-scale": tiny_var, "text": tiny_text}
ODE = OdeConfig(steps=6)


def standardised(kind: str = "raster") -> CodeTeacher:
    teacher = TEACHERS[kind]()
    teacher.standardise()
    return teacher


def noise_of(teacher: CodeTeacher, count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, *teacher.backbone.token_shape), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", TEACHERS)
def test_its_tokens_are_codes_and_its_gradient_is_the_expected_codes(kind):
    teacher = standardised(kind)
    generator, cond = CodeStudent.from_teacher(teacher), teacher.conditions(torch.tensor([0, 1, 2]))
    drawn = generator.draw(noise_of(teacher), cond)
    assert drawn.logits is not None
    torch.testing.assert_close(drawn.tokens, teacher.codebook[drawn.logits.argmax(-1)])
    weights = torch.randn(drawn.tokens.shape, generator=torch.Generator().manual_seed(1))
    (drawn.tokens * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in generator.named_parameters() if p.grad is not None}
    generator.zero_grad()
    logits = generator.draw(noise_of(teacher), cond).logits
    assert logits is not None
    ((logits.softmax(-1) @ teacher.codebook) * weights).sum().backward()
    for name, p in generator.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad)
    assert {"output.weight"} <= set(found)


@pytest.mark.parametrize("kind", TEACHERS)
def test_it_starts_as_the_teachers_layers_and_more_of_them_change_nothing(kind):
    teacher = standardised(kind)
    cond = teacher.conditions(torch.tensor([0, 1, 2]))
    plain, deep = CodeStudent.from_teacher(teacher), CodeStudent.from_teacher(teacher, extra_layers=2)
    a, b = plain.draw(noise_of(teacher), cond).logits, deep.draw(noise_of(teacher), cond).logits
    torch.testing.assert_close(a, b)
    assert sum(p.numel() for p in deep.parameters()) > sum(p.numel() for p in plain.parameters())
    assert a is not None
    (a.sum() + b.sum()).backward()  # pyright: ignore[reportOptionalMemberAccess]
    ends = [end for layer in list(deep.backbone.stack)[-2:] for end in layer.branch_ends()]  # pyright: ignore
    assert all(end.weight.grad.abs().sum() > 0 for end in ends)  # they will learn


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_further_round_starts_as_the_teacher_reading_the_codes_of_the_round_before(kind):
    teacher = standardised(kind)
    cond, noise = teacher.conditions(torch.tensor([0, 1, 2])), noise_of(teacher)
    once, twice = CodeStudent.from_teacher(teacher), CodeStudent.from_teacher(teacher, rounds=3)
    first, drawn = once.draw(noise, cond), twice.draw(noise, cond)
    assert first.logits is not None
    assert drawn.logits is not None
    assert len(drawn.earlier) == 2
    torch.testing.assert_close(drawn.earlier[0], first.logits)
    torch.testing.assert_close(drawn.earlier[1], teacher.logits(first.tokens, cond))
    second = teacher.codebook[drawn.earlier[1].argmax(-1)]
    torch.testing.assert_close(drawn.logits, teacher.logits(second, cond))


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_round_is_told_its_own_noise_and_that_of_earlier_steps(kind):
    """Position i of a further round sees noise up to its own step, none of later ones; the earlier codes by the round before."""
    teacher = standardised(kind)
    student = CodeStudent.from_teacher(teacher, rounds=2).requires_grad_(False)
    assert student.again is not None
    for parameter in student.again.parameters():
        nn.init.normal_(parameter, std=0.2)
    cond, noise, tokens = teacher.conditions(torch.tensor([0, 1, 2])), noise_of(teacher), noise_of(teacher, seed=5)
    before = student.again(tokens, noise, cond)
    step = teacher.order.steps[1]
    moved = noise.clone()
    moved[:, step.start] += 1
    found = (student.again(tokens, moved, cond) - before).abs().amax((0, 2))
    assert found[step.start] > 1e-3
    assert found[: step.start].max() < 1e-5
    later = tokens.clone()
    later[:, step] += 1
    found = (student.again(later, noise, cond) - before).abs().amax((0, 2))
    assert found[: step.stop].max() < 1e-5
    assert found[step.stop :].max() > 1e-3


def test_every_round_learns_by_its_own_loss_and_no_gradient_flows_between_them():
    teacher = standardised()
    student, cond = CodeStudent.from_teacher(teacher, rounds=2), torch.tensor([0, 1, 2])
    drawn, ids = student.draw(noise_of(teacher), cond), teacher.generate(torch.tensor([0, 1, 2]), Sampling(), range(3))
    loss, _ = code_loss(drawn, teacher, ids)
    assert drawn.logits is not None
    terms = [nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()) for logits in (drawn.logits, drawn.earlier[0])]
    torch.testing.assert_close(loss, terms[0] + 0.5 * terms[1])
    terms[0].backward(retain_graph=True)
    assert student.output.weight.grad is None
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_rounds_without_what_they_learn_by_are_refused():
    with pytest.raises(InputError, match=r"networks\.rounds needs networks\.generator codes"):
        NetworksConfig(rounds=2)
    with pytest.raises(InputError, match=r"networks\.rounds must be at least 1"):
        NetworksConfig(generator="codes", rounds=0)
    teacher = standardised()
    kind = type(teacher.backbone)
    teacher.backbone.__class__ = type("Untold", (kind,), {"told_features": None})  # None: it has no such method
    assert CodeStudent.from_teacher(teacher).again is None
    with pytest.raises(InputError, match="no told_features"):
        CodeStudent.from_teacher(teacher, rounds=2)


def test_distillation_refuses_rounds_that_could_not_learn():
    teacher, networks = standardised(), NetworksConfig(generator="codes", rounds=2)
    with pytest.raises(InputError, match=r"networks\.rounds needs regress\.iterations"):
        check(DistillConfig(networks=networks), teacher)
    assert CodeStudent.from_teacher(teacher, rounds=2).config == sizes_over_codes(networks, teacher)
    assert sizes_over_codes(NetworksConfig(), teacher) is None


def randomised(teacher, rounds: int) -> CodeStudent:
    """A generator of which no weight is the teacher's."""
    student = CodeStudent.from_teacher(teacher, rounds=rounds).eval()
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return student


@pytest.mark.parametrize("kind", TEACHERS)
def test_fewer_rounds_end_earlier_and_more_go_on(kind):
    teacher = standardised(kind)
    student, cond, noise = randomised(teacher, 3), teacher.conditions(torch.tensor([0, 1, 2])), noise_of(teacher)
    drawn = student.draw(noise, cond)
    for rounds, logits in enumerate([*drawn.earlier, drawn.logits], 1):
        other = student.in_rounds(rounds)
        assert other.rounds == rounds
        assert not other.training
        torch.testing.assert_close(other.draw(noise, cond).logits, logits)
        assert other.backbone is student.backbone  # nothing is copied
    assert student.in_rounds(3) is student
    assert student.again is not None
    assert drawn.logits is not None
    fourth = student.again(teacher.codebook[drawn.logits.argmax(-1)], noise, cond)
    torch.testing.assert_close(student.in_rounds(4).draw(noise, cond).logits, fourth)


def test_rounds_that_were_not_trained_are_refused():
    teacher = standardised()
    one, velocity = CodeStudent.from_teacher(teacher), Student.from_teacher(teacher, HeadConfig(1, 8, 2))
    assert one.in_rounds(1) is one
    assert velocity.in_rounds(1) is velocity
    for student in (one, velocity):
        with pytest.raises(InputError, match=r"rounds 2: this generator was trained to draw in one round"):
            student.in_rounds(2)
    with pytest.raises(InputError, match="rounds at least 1"):
        CodeStudent.from_teacher(teacher, rounds=2).in_rounds(-1)


def test_a_generator_is_sampled_and_shipped_in_fewer_rounds(tmp_path):
    teacher = standardised()
    save_generator(tmp_path / "g", Generator.of(randomised(teacher, 3), teacher))
    for rounds in ("0", "1", "3"):
        main(["sample", str(tmp_path / "g"), "--count", "3", "--rounds", rounds, "--out", str(tmp_path / f"{rounds}.npz")])
    whole, first, third = (np.load(tmp_path / f"{rounds}.npz")["arr_0"] for rounds in ("0", "1", "3"))
    assert (whole == third).all()
    assert (whole != first).any()
    pipe = OneStepPipeline.from_pretrained(tmp_path / "g", rounds=1, dtype="float32")
    pipe.save_pretrained(tmp_path / "fast")
    assert main(["export", str(tmp_path / "g"), str(tmp_path / "exported"), "--rounds", "1"]) == 0
    assert "drawing in rounds: 1" in (tmp_path / "exported" / "README.md").read_text()
    for folder in ("fast", "exported"):
        again = OneStepPipeline.from_pretrained(tmp_path / folder, dtype="float32")
        assert again.generator.student.rounds == 1
        assert not any("again" in name for name in again.generator.student.state_dict())
        torch.testing.assert_close(again([0, 1, 2]).tokens, pipe([0, 1, 2]).tokens)


def test_an_evaluation_compares_numbers_of_rounds(tmp_path):
    teacher = standardised()
    ways = Ways(Generator.of(randomised(teacher, 3), teacher), teacher)
    marginal = MarginalSampler(TeacherSamples.prepare(tmp_path, teacher, Sampling(), 6, 0, 6))
    found = methods(ways, teacher, marginal, "three", rounds=(1, 3, 5))
    assert found["generator"].title == "Generator, one step of 3 rounds"
    assert [found[in_rounds(k)].title for k in (1, 5)] == ["Generator, one step, 1 round", "Generator, one step, 5 rounds"]
    assert in_rounds(3) not in found  # it is the generator's own row
    assert found[in_rounds(1)].decides != found[in_rounds(5)].decides
    labels, seeds = torch.tensor([0, 1, 2]), [0, 1, 2]
    drawn, first = (found[name].draw(labels, seeds)[1] for name in ("generator", in_rounds(1)))
    torch.testing.assert_close(drawn, ways.one_step()(teacher.conditions(labels), seeds))
    assert first is not None
    assert (first != drawn).any()


@pytest.mark.parametrize(("extra", "rounds"), [(0, 1), (3, 1), (2, 3)])
def test_a_folder_gives_it_back(tmp_path, extra, rounds):
    teacher = standardised()
    generator = CodeStudent.from_teacher(teacher, extra_layers=extra, rounds=rounds)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_generator(tmp_path / "g", Generator.of(generator, teacher))
    found = load_generator(tmp_path / "g").student
    assert isinstance(found, CodeStudent)
    cond = torch.tensor([0, 1, 2])
    torch.testing.assert_close(found.as_generator(noise_of(teacher), cond), generator.as_generator(noise_of(teacher), cond))


def test_the_guidance_network_starts_as_the_teacher():
    """So the score difference is 0, for any t, where neither top-k nor a null condition changes the teacher."""
    teacher = standardised()
    cond, tokens = torch.tensor([0, 1, 2]), teacher.codebook[teacher.generate(torch.tensor([0, 1, 2]), Sampling(), range(3))]
    guidance = CodeGuidance.from_teacher(teacher)
    x_t, t = noise_of(teacher, seed=3), torch.full((3, 16), 0.4)
    with torch.no_grad():
        wanted, found = teacher.given(tokens, cond, Sampling()), guidance.given(tokens, cond)
        _, difference = csd_loss(x_t.requires_grad_(), t, noise_of(teacher, seed=4), wanted, found, d="dmd")
    assert float(difference) < 1e-5
    by_hand = velocity(x_t.detach(), t, guidance.logits(tokens, cond).log_softmax(-1).detach(), teacher.codebook)
    torch.testing.assert_close(found.velocity(x_t.detach(), t), by_hand)


def test_the_guidance_loss_over_codes_is_the_likelihood_of_the_generated_sequences():
    teacher = standardised()
    guidance, cond = CodeGuidance.from_teacher(teacher), torch.tensor([0, 1, 2])
    q = noise_of(teacher)  # of any generator: nearest codes are what is learned
    loss, _ = guidance_loss(guidance, q, teacher, cond, CSDConfig(), torch.Generator())
    ids = torch.cdist(q, teacher.codebook).argmin(-1)
    log_p = guidance.logits(teacher.codebook[ids], cond).log_softmax(-1)
    torch.testing.assert_close(loss, -log_p.gather(-1, ids.unsqueeze(-1)).mean())
    loss.backward()
    assert all(p.grad is not None for p in guidance.parameters())


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("guidance_kind", ["velocity", "codes"])
def test_stage_two_reaches_the_generator_alone(kind, guidance_kind):
    teacher = standardised(kind).requires_grad_(True)
    generator = CodeStudent.from_teacher(teacher)
    guidance = CodeGuidance.from_teacher(teacher) if guidance_kind == "codes" else Student.from_teacher(teacher, TINY_HEAD)
    for parameter in guidance.parameters():  # the teacher's own score would give no gradient
        nn.init.normal_(parameter, std=0.3)
    cond = teacher.conditions(torch.tensor([0, 1, 2]))
    config = CSDConfig(d="dmd", sampling=Sampling(top_k=5), snap_teacher=True, regression_weight=0.5)
    loss, numbers = generator_loss(generator, guidance, teacher, cond, config, torch.Generator().manual_seed(0), ode=ODE)
    loss.backward()
    assert generator.output.weight.grad.abs().sum() > 0  # pyright: ignore
    assert all(p.grad is None for network in (teacher, guidance) for p in network.parameters())
    assert {"regression", "right_codes", "score_difference"} <= numbers.keys()


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_odes_data_are_the_only_fixed_point_given_own_tokens(kind):
    """Whatever the start, S iterations of the map end at the sequence that the ODE makes step by step, which then stays."""
    teacher, sampling = standardised(kind), Sampling(top_k=6)
    cond, noise = teacher.conditions(torch.tensor([0, 1, 2])), noise_of(teacher)
    wanted = data_of_noise(teacher, noise, cond, sampling, steps=ODE.steps, solver=ODE.solver)
    ids = torch.randint(12, wanted.shape, generator=torch.Generator().manual_seed(2))
    steps = teacher.order.num_steps
    for step in range(steps):
        ids = data_given(noise, teacher.given(teacher.codebook[ids], cond, sampling), ODE)
        known = teacher.order.steps[step].stop
        assert (ids[:, :known] == wanted[:, :known]).all()
    assert (data_given(noise, teacher.given(teacher.codebook[ids], cond, sampling), ODE) == wanted).all()


def test_a_batch_is_pairs_and_own_tokens():
    teacher, sampling = standardised(), Sampling()
    generator, cond = CodeStudent.from_teacher(teacher), torch.tensor([0, 1, 2])
    pairs = noise_of(teacher, 2, 5), torch.randint(12, (2, 16)), torch.tensor([1, 1])
    noise = noise_of(teacher)
    loss, _ = regress_own_loss(generator, teacher, pairs, noise, cond, sampling, ODE)
    own = generator.draw(noise, cond)
    ids = data_given(noise, teacher.given(own.tokens.detach(), cond, sampling), ODE)
    first = code_loss(generator.draw(pairs[0], pairs[2]), teacher, pairs[1])[0]
    torch.testing.assert_close(loss, (2 * first + 3 * code_loss(own, teacher, ids)[0]) / 5)


def test_code_loss_of_both_kinds():
    teacher, ids = standardised(), torch.zeros(1, 16, dtype=torch.long)
    logits = torch.zeros(1, 16, 12)
    logits[..., 0] = 2.0
    loss, numbers = code_loss(Drawn(teacher.codebook[ids], logits), teacher, ids)
    assert float(loss) == pytest.approx(float((torch.tensor(2.0).exp() + 11).log() - 2))
    assert float(numbers["right_codes"]) == 1
    moved, _ = code_loss(Drawn(teacher.codebook[ids] + 0.5), teacher, ids)
    assert float(moved) == pytest.approx(0.25, abs=1e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"extra_layers needs networks\.generator codes"):
        NetworksConfig(extra_layers=1)
    with pytest.raises(InputError, match="own_share"):
        RegressConfig(own_share=1.5)
    with pytest.raises(InputError, match="branch_ends"):
        append_identities(LayerStack([nn.Linear(2, 2)]), 1)
