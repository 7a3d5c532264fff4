"""What dd2 distill is told, and what of it does not go with a teacher."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from dd2.code_student import has_own_classifier
from dd2.commands.adapt import check_adaptation
from dd2.errors import InputError
from dd2.method.config import AdaptConfig, AlignConfig, CSDConfig, NetworksConfig, RegressConfig, TuneConfig
from dd2.method.match import check_reference
from dd2.method.networks import is_ar_diffusion, networks_over_codes
from dd2.processes import say
from dd2.student import HeadConfig
from dd2.teachers.base import Teacher
from dd2.teachers.code import require_codes
from dd2.teachers.layers import layer_stacks
from dd2.teachers.masked import MaskedBackbone
from dd2.teachers.own_token import IsTold, ReadsOwnToken
from dd2.training.loop import LoopConfig


@dataclass(frozen=True)
class DistillConfig:
    """Distil a teacher into a one-step generator.

    Gives the teacher a continuous input layer if it has none (stage 0), samples it, tunes an AR-diffusion model on those
    samples (stage 1), lets the generator regress the teacher's ODE if regress.iterations say so, then trains generator and
    guidance network (stage 2). Writes OUT/generator/ (what dd2 sample and dd2 evaluate read), ar_diffusion/, metrics.jsonl,
    checkpoints/, samples/, config.yaml and versions.json, and teacher/ after a stage 0. Run the same command again to resume.
    """

    teacher: str = "digits"
    """"digits" (embedded); a teacher folder; a run's ar_diffusion/ folder, which is an AR model itself; or module:function of
    yours, which gives a `dd2.teachers.base.Teacher`."""
    trust: tuple[str, ...] = ()
    """Modules of yours that an ar_diffusion/ folder may import, because its own teacher was module:function."""
    captions: str = ""
    """Captions of a text-conditional teacher, which its labels count: a list of prompts (a file, or "scenes"), which the encoder
    that the teacher remembers reads, or their features from dd2 text-features."""
    text_encoder: str = ""
    """Where the text encoder of a text-conditional teacher lies on this machine, if not where the teacher says."""
    out: Path = Path("runs/distill")
    """Run folder; an interrupted run in it is resumed."""
    stage1: str = ""
    """Run folder of another dd2 distill of the same teacher, whose teacher samples and stage-1 model this run starts from."""
    seed: int = 0
    """Seed of the weights, of the teacher's samples and of every step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    teacher_samples: int = 400_000
    """Sequences sampled from the teacher: for stage 1, and whose labels, tokens' standardisation, matching and validation use."""
    sample_batch: int = 64
    """Sequences sampled from the teacher at a time."""
    sample_in_loop: bool = False
    """Draw the sequences of stage 1 anew for every batch instead of from the teacher samples on disk. Those then give the tokens'
    standardisation, the reference of csd.validation and stage 2's labels: as many as cover all labels are enough."""
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    """What generator and guidance network are."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The velocity head."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """Stage 0, for teachers with an embedding table."""
    tune: TuneConfig = field(default_factory=TuneConfig)
    """Stage 1."""
    regress: RegressConfig = field(default_factory=RegressConfig)
    """A start of the generator that is not the paper's: the teacher's ODE, regressed."""
    csd: CSDConfig = field(default_factory=CSDConfig)
    """Stage 2."""
    align: AlignConfig = field(default_factory=AlignConfig)
    """Performance alignment."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Logging and saving."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        for name in ("teacher_samples", "sample_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.teacher_samples == 1 and self.csd.validation:
            raise InputError("csd.validation needs at least 2 teacher_samples: one has no spread")
        if self.sample_in_loop and self.stage1:
            raise InputError("sample_in_loop is about stage 1, which stage1 takes from another run; give one of them")
        if self.align.iterations and not self.align.then_iterations:
            raise InputError("align.iterations needs align.then_iterations: alignment prepares further distillation")


def with_usual_sampling(config: DistillConfig, teacher: Teacher) -> DistillConfig:
    """The same, with the teacher's usual sampling where none is given."""
    tune = teacher.usually(config.tune.sampling, TuneConfig().sampling)
    csd = teacher.usually(config.csd.sampling, CSDConfig().sampling)
    return replace(config, tune=replace(config.tune, sampling=tune), csd=replace(config.csd, sampling=csd))


def check(config: DistillConfig, teacher: Teacher) -> None:
    """Refuse what the teacher cannot use, and say what has no effect on it.

    Raises:
        InputError: something does not go with the teacher.
    """
    teacher.conditions.digest()  # refuses missing captions
    said = {teacher.check(sampling) for sampling in (config.tune.sampling, config.csd.sampling)} - {""}
    if not teacher.backbone.continuous:
        check_adaptation(teacher, config.adapt)
    refuse_without_codes(config, teacher)
    kinds = config.networks
    if kinds.rounds > 1 and not config.regress.iterations:
        raise InputError("networks.rounds needs regress.iterations: the rounds before the last learn by the regression alone")
    if kinds.rounds > 1 and not config.csd.regression_weight:
        said.add("the rounds before the last stay as the regression leaves them: csd.regression_weight is 0")
    untold = kinds.rounds > 1 and not isinstance(teacher.backbone, IsTold)
    if kinds.generator == "codes" and (kinds.extra_layers or untold or not isinstance(teacher.backbone, ReadsOwnToken)):
        networks_over_codes(replace(kinds, guidance="velocity"), teacher)  # says what is missing
    if "codes" in (kinds.generator, kinds.guidance) and not has_own_classifier(require_codes(teacher, "networks over codes")):
        said.add("networks over codes start with a fresh classifier: the teacher computes features or logits in its own way")
    if not config.networks.need_stage1:
        if config.stage1:
            raise InputError("stage1 names another run's stage 1, but networks.* are codes and need none; leave it out")
        said.add("stage 1 is left out, as both networks are over codes: tune.* (but for its sampling) and head.* have no effect")
    if config.networks.guidance == "codes" and config.csd.snap_guidance:
        said.add("csd.snap_guidance has no effect: a guidance network over codes reads codes in any case")
    if "codes" in (config.networks.generator, config.networks.guidance) and config.csd.initialised != "both":
        said.add("csd.initialised has no effect on networks over codes, which start as the teacher")
    if config.sample_in_loop and (is_ar_diffusion(teacher) or not config.networks.need_stage1):
        said.add("sample_in_loop has no effect without stage 1")
    if config.networks.level != NetworksConfig.level and not isinstance(teacher.backbone, MaskedBackbone):
        said.add("networks.level has no effect: it is about masked teachers (MAR)")
    if is_ar_diffusion(teacher) and (config.csd.snap_teacher or config.csd.snap_guidance):
        said.add("csd.snap_* has no effect: the teacher's tokens are no codes")
    if isinstance(teacher.backbone, MaskedBackbone) and config.csd.sampling.temperature != 1:
        said.add("csd.sampling.temperature is the sampler's alone: scores know none, and the generator learns temperature 1")
    if config.regress.iterations and config.regress.own_share == 1:
        said.add("regress.pairs has no effect, as regress.own_share is 1")
    if config.csd.match.on:
        check_reference(teacher, config.csd.match, config.teacher_samples)
        if not layer_stacks(teacher.backbone):
            said.add("csd.validation looks at the features that csd.match trains on: the backbone has no LayerStack")
    if is_ar_diffusion(teacher):
        if config.stage1:
            raise InputError("stage1 names another run's stage 1, but this teacher is an AR-diffusion model itself; leave it out")
        said.add("stage 1 is skipped, as the teacher is such a model: tune.* (but for its sampling) and head.* have no effect")
    if (config.loop.recompute or config.loop.compile) and not layer_stacks(teacher.backbone):
        said.add("loop.recompute and loop.compile have no effect: the backbone has no LayerStack (docs/add-a-model.md)")
    for text in sorted(said):
        say(f"note: {text}", sys.stderr)


def refuse_without_codes(config: DistillConfig, teacher: Teacher) -> None:
    """Refuse what needs codes, or a map from noise to data, of a teacher without.

    Raises:
        InputError: it is asked for.
    """
    regress = config.regress
    needing = {
        "regress.own_share": regress.iterations and regress.own_share,
        "csd.regression_weight": config.csd.regression_weight,
        "networks.generator codes": config.networks.generator == "codes",
        "networks.guidance codes": config.networks.guidance == "codes",
    }
    for what in (name for name, wanted in needing.items() if wanted):
        require_codes(teacher, what)
    if regress.iterations:
        teacher.check_ode(regress.ode.steps)
