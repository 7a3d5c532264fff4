"""What docs/own-teacher.md promises: a foreign backbone goes through both stages, saving and loading."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dd2.checkpoints import native
from dd2.checkpoints.native import Generator, load_generator, save_generator
from dd2.errors import InputError
from dd2.order import RasterOrder
from dd2.sampling import ar_diffusion, one_step
from dd2.stages.config import CSDConfig, TuneConfig
from dd2.stages.recipe import Networks, distill_stage, tune_stages
from dd2.student import Student
from dd2.teachers.base import Backbone, Teacher
from dd2.teachers.filtering import Sampling
from dd2.tokenizers.vq import VQTokenizer
from dd2.training.loop import LoopConfig, Trainer
from dd2.training.samples import TeacherSamples
from models import TINY_HEAD, TINY_VQ


@dataclass(frozen=True)
class BagConfig:
    """A "model" whose feature is the class plus the mean of all earlier tokens."""

    width: int = 12


class BagBackbone(Backbone):
    def __init__(self, config: BagConfig, code_dim: int) -> None:
        super().__init__(RasterOrder(4, 4), config.width, code_dim)
        self.config = config
        self.classes, self.mix = nn.Embedding(3, config.width), nn.Linear(code_dim, config.width)

    def forward(self, tokens, cond):
        earlier = torch.cat([torch.zeros_like(tokens[:, :1]), self.order.inputs(self.to_codes(tokens))], 1)
        count = torch.arange(16).clamp_min(1).view(1, -1, 1)
        return torch.tanh(self.classes(cond).unsqueeze(1) + self.mix(earlier.cumsum(1) / count))

    def null_condition(self, cond):
        return torch.full_like(cond, 2)

    @property
    def num_labels(self):
        return 2

    def new_cache(self):
        return None

    def next_features(self, cache, tokens, cond):
        padded = torch.cat([tokens, tokens.new_zeros(len(tokens), 16 - tokens.shape[1], tokens.shape[2])], 1)
        return self(padded, cond)[:, tokens.shape[1] : tokens.shape[1] + 1]


def bag_teacher(config: BagConfig, tokenizer) -> Teacher:
    return Teacher(BagBackbone(config, 4), nn.Linear(config.width, 12), tokenizer)


def test_a_foreign_backbone_goes_all_the_way(tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher = bag_teacher(BagConfig(), VQTokenizer(TINY_VQ)).eval().requires_grad_(False)
    sampling = Sampling(cfg_scale=1.5)
    tune = TuneConfig(iterations=3, batch=4, accumulate=1, sampling=sampling)
    csd = CSDConfig(iterations=3, k=1, batch=4, accumulate=1, sampling=sampling)
    samples = TeacherSamples.prepare(tmp_path / "samples", teacher, tune.sampling, count=32, seed=0)
    teacher.backbone.standardise(teacher.tokenizer.codebook, samples.ids)
    trainer = Trainer(tmp_path, 0, LoopConfig(preview_every=0), torch.device("cpu"), "again")
    student = Student.from_teacher(teacher, TINY_HEAD)
    for stage in tune_stages(student, teacher, samples, tune):
        trainer.run(stage)
    networks = Networks.from_tuned(student)
    trainer.run(distill_stage(networks, teacher, samples, csd))
    generator = Generator(networks.ema, teacher.tokenizer)
    with pytest.raises(InputError, match="BagBackbone belongs to no known family"):
        save_generator(tmp_path / "generator", generator)
    assert not (tmp_path / "generator").exists()
    monkeypatch.setitem(native.TEACHERS, "bag", (BagConfig, bag_teacher, BagBackbone))
    save_generator(tmp_path / "generator", generator)
    loaded = load_generator(tmp_path / "generator")
    labels = torch.tensor([0, 1, 1])
    assert torch.equal(one_step(loaded.student, labels, range(3)), one_step(networks.ema, labels, range(3)))
    assert ar_diffusion(loaded.ar_student, labels, range(3)).shape == (3, 16, 4)
