"""What an evaluation does: the fields of dd2 evaluate."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from dd2.baselines.marginal import Over
from dd2.config import RunFolder
from dd2.errors import InputError
from dd2.evaluation.metrics import MetricConfig
from dd2.precision import Precision
from dd2.sampling import Prefix
from dd2.teachers.filtering import OtherSampling

OF_RUNS = (
    *("count", "steps", "prefix", "rounds", "skip", "teacher_steps", "guidance", "marginal", "path_length", "epsilon"),
    *("curve", "precision", "speed", "trust", "text_encoder"),
)
"""Fields that decide what is drawn of a run."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a distilled run against its teacher, or a set of images, and store beside each number what decides it.

    Writes metrics.json, samples.png, curves.png and report.html into RUN (of prompts into RUN/prompts/NAME); features are kept
    in RUN/features, so that an interrupted evaluation goes on where it stopped, and torchrun splits it over processes. The
    Fréchet distance (FD; FID with --features inception-2015-12-05.pt) is to `reference`; with the teacher as reference its own
    row, from other seeds, is the floor. gap_closed is how far the generator got from independent tokens (onestep_marginal) to
    the teacher's row. The teacher samples as it did in distillation.
    """

    run: RunFolder = Path()
    """Run folder of dd2 distill."""
    images: Path | None = None
    """Score all of these images instead of a run: a folder, a zip, or an .npz with arr_0 (uint8 NHWC). Needs a reference."""
    reference: str = "teacher"
    """"teacher"; statistics (ADM's .npz, or made by dd2 reference); or images: a folder, zip or .npz."""
    count: int = 10_000
    """Images per method (papers: 50,000), the same number of every class or prompt. Of `images`, all are scored."""
    prompts: str = ""
    """Of a text-conditional run, prompts to draw in place of the captions that it was distilled with: a text file, one a line, a
    .csv, .json or .jsonl, "scenes", "scenes-unseen", or features of dd2 text-features. What is written goes to RUN/prompts/NAME.
    Of `images`, what each is to show, in order; by default their folder's captions.txt."""
    text_encoder: str = ""
    """Where the text encoder lies on this machine, if not where the model says."""
    clip: tuple[str, ...] = ()
    """CLIP scores against the prompts, in the named variants of docs/text-to-image.md, such as clip_b32_prefix; NAME@FOLDER where
    the weights lie elsewhere than in the Hub's local cache."""
    steps: tuple[int, ...] = (1,)
    """1 is the generator alone; each k > 1 adds a row in which the teacher redraws the last k - 1 AR steps (Alg. 4)."""
    prefix: Prefix = "snapped"
    """What the teacher reads of the generator's tokens in those rows: their nearest codes, or the tokens as they are (Alg. 4)."""
    rounds: tuple[int, ...] = ()
    """Of a generator that draws in several rounds (networks.rounds), each adds a row: the same weights in so many, which
    is faster where they are fewer."""
    skip: tuple[int, ...] = ()
    """Each m adds a row: the teacher without its last m AR steps (skip-m)."""
    teacher_steps: tuple[int, ...] = ()
    """Each adds a row: a masked teacher (MAR) in so many AR steps, from 2 to its tokens; 1 is onestep*."""
    teacher_at: OtherSampling = field(default_factory=OtherSampling)
    """Adds a row: the teacher as it samples with these settings, such as those its own paper evaluates it with (VAR: cfg_scale
    1.5, top_k 900, top_p 0.96), where it was distilled with others."""
    guidance: bool = False
    """Adds a row: the guidance network of the newest checkpoint, drawing step by step as the AR model that it is. Worse than the
    generator, it lags behind it (App. C.3)."""
    marginal: Over = "class"
    """Token frequencies of onestep*: of each class, or of the whole data set (App. E.5)."""
    features: str = "digits"
    """"digits" (embedded classifier), or the folder of another (dd2 train-classifier); "inception" (ADM's, fetched once) or a
    path to inception-2015-12-05.pt; "inception-clean" (clean-fid's resize) or "inception-coco" (middle square by Lanczos to 256,
    then that resize: COCO-30k), or either with @PATH; or module:function of your own."""
    metrics: MetricConfig = field(default_factory=MetricConfig)
    """Metrics and their settings."""
    path_length: int = 0
    """Paths of the generator's perceptual path length (paper's Table 5); 0 leaves it out."""
    epsilon: float = 1e-4
    """Step of the path length."""
    export: Path | None = None
    """Also write the generator's images as an .npz for ADM's evaluator: arr_0, uint8 NHWC, shuffled."""
    allow_unbalanced: bool = False
    """Score a count that is no multiple of the number of labels, or images with more of one label than of another."""
    allow_duplicates: bool = False
    """Score images that were drawn with the same seed more than once."""
    curve: bool = False
    """Also score every checkpoint that the run keeps (loop.save_every, loop.keep), and draw distance against training."""
    speed: bool = True
    """Also measure seconds per image of every method."""
    cache: Path | None = None
    """Folder of features on disk, RUN/features by default: runs of one teacher that share it draw the teacher once."""
    trust: tuple[str, ...] = ()
    """Modules of yours that the run may import, because its teacher was module:function."""
    precision: Precision = "float32"
    """Arithmetic in which images are drawn: float32, bfloat16, float16 (CUDA), or auto. Features, metrics and the teacher NLL are
    float32 in any case."""
    batch: int = 500
    """Images at a time."""
    seed: int = 0
    """Seed of the evaluation; training never uses its streams."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse counts too small for a covariance, and requests that contradict each other."""
        if self.count < 2 or self.batch < 1:
            raise InputError(f"count must be at least 2 and batch at least 1, got {self.count} and {self.batch}")
        if min(self.teacher_steps, default=2) < 2:
            raise InputError(f"teacher_steps must be at least 2, got {min(self.teacher_steps)}; onestep* is the teacher in 1")
        if self.path_length < 0 or 0 < self.path_length < 3 or not 0 < self.epsilon < 1:
            raise InputError(
                f"path_length must be 0 or at least 3 and epsilon in (0, 1), got {self.path_length} and {self.epsilon}"
            )
        usual = {field.name: field.default for field in fields(self) if field.name in OF_RUNS}
        drawn = [name for name, value in usual.items() if getattr(self, name) != value]
        drawn += ["teacher_at"] if self.teacher_at.given else []
        drawn += [f"the run {self.run}"] if self.run != Path() else []
        if self.images is not None and drawn:
            raise InputError(
                f"{', '.join(drawn)} would have no effect on images, which are all scored and not drawn; leave it out"
            )
        without_effect = {
            ("prefix", "steps are 1"): self.prefix != "snapped" and max(self.steps, default=1) == 1,
            ("epsilon", "path_length is 0"): self.epsilon != 1e-4 and not self.path_length,
            ("allow_duplicates", "a run draws every seed once"): self.allow_duplicates and self.images is None,
        }
        for (name, why), found in without_effect.items():
            if found:
                raise InputError(f"{name} would have no effect, as {why}; leave it out")
        named = [spec.partition("@")[0] for spec in self.clip]
        if len({*named}) < len(named):
            raise InputError(f"clip names a variant twice: {', '.join(named)}")
        if self.prompts and self.curve:
            raise InputError("curve goes with the captions that the run was distilled with; leave prompts out, or curve")
        if self.images is not None and self.prompts and not self.clip:
            raise InputError("prompts have no effect on images but for --clip; leave them out, or name a CLIP score")
        if self.images is not None and self.reference == "teacher":
            raise InputError("images have no teacher: give --reference, e.g. ADM's .npz or a folder of real images")
        if self.export is not None and (self.export.suffix != ".npz" or self.images is not None):
            raise InputError("export must be an .npz, and goes with a run, not with images")
