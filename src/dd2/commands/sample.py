"""dd2 sample: images from a distilled run, its stage-1 model or its teacher."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from dd2.checkpoints.runs import Texts, open_generator, open_run
from dd2.config import RunFolder
from dd2.device import pick_device
from dd2.errors import InputError, Interrupted
from dd2.files import weights_digest, writable_folder
from dd2.precision import Precision, name_of, pick_precision
from dd2.processes import answering, say
from dd2.progress import progress
from dd2.provenance import commit
from dd2.sampling import Draw, Prefix, Ways
from dd2.seeding import SEEDS
from dd2.shipping.hub import located
from dd2.teachers.conditions import Conditions
from dd2.teachers.filtering import OtherSampling
from dd2.text.captions import is_features, listed
from dd2.text.layouts import LAYOUTS, Layout, LayoutName, write_files
from dd2.text.prompts import Prompts, typed
from dd2.writers import open_writer

USUAL_COUNT = 64
"""Images where neither count nor prompts say how many."""


@dataclass(frozen=True)
class SampleConfig(OtherSampling):
    """Draw images. Image i has seed `seed` + i and label labels[i mod the number of labels].

    The same seed and label give the same image, whatever the count and the batch (up to rounding in the precision). Files are
    written as images are drawn; an interruption keeps those that are done.
    """

    run: RunFolder
    """Run folder of dd2 distill or dd2 demo, a generator folder (one step only), or owner/name on the Hugging Face Hub."""
    out: Path = Path("samples.png")
    """What to write: a .png (one grid), an .npz (arr_0 uint8 NHWC, labels, seeds), or a folder (a file per image)."""
    labels: tuple[str, ...] = ("all",)
    """Classes by number or name, or line numbers of captions, in turn: 3 seven, or 3,seven; "all" takes every one."""
    prompt: tuple[str, ...] = ()
    """Of a text-conditional model, texts to draw, in turn: --prompt "a three above a seven" "two fives"."""
    prompts: str = ""
    """A list of them: a text file, one a line, a .csv, .json or .jsonl (GenEval, HPSv2, MJHQ), "scenes", "scenes-unseen", or
    features of dd2 text-features. By default the captions that the run was distilled with."""
    per_prompt: int = 1
    """Images of each prompt, where prompts are given and no count; image i is of prompt i modulo their number."""
    text_encoder: str = ""
    """Where the text encoder lies on this machine, if not where the model says: folder, owner/name or owner/name@revision."""
    layout: LayoutName = "plain"
    """How a folder of prompts' images is laid out. plain: number, label and seed in each name. For scorers of others: captions
    (images/ and captions.txt: LlamaGen, GigaGAN), geneval, hpsv2, mjhq."""
    count: int | None = None
    """Images; by default 64, or per_prompt of each prompt."""
    seed: int = 0
    """Seed of image 0."""
    first: int = 0
    """Number of the first image: several jobs, or a second one after an interruption, can share one numbering."""
    steps: int = 1
    """1: the generator alone. k: the teacher redraws the last k - 1 AR steps (Alg. 4)."""
    rounds: int = 0
    """Of a generator trained in several rounds (networks.rounds), how many a pass has: fewer are faster; 0: as trained."""
    prefix: Prefix = "snapped"
    """What the teacher reads of the generator's tokens under steps: their nearest codes, or the tokens as they are (Alg. 4)."""
    method: Literal["generator", "two_passes", "ar_diffusion", "teacher"] = "generator"
    """generator: one or few steps. two_passes: a DD1 student's second pass. ar_diffusion: the stage-1 model, step by step.
    teacher: AR sampling, with a key/value cache where there is one."""
    decoding: Literal["continuous", "nearest"] = "continuous"
    """Decode tokens as they are, or snapped to their nearest codes."""
    trust: tuple[str, ...] = ()
    """Modules of yours that the run may import, because its teacher was module:function."""
    precision: Precision = "auto"
    """Arithmetic of the networks (dd2 evaluate has float32): bfloat16, float32, or float16 on CUDA. auto: bfloat16 where the
    device computes in it."""
    batch: int = 256
    """Images at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse counts below 1 and unknown file types."""
        for name in ("count", "steps", "batch", "per_prompt"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.check_seeds(self.count or USUAL_COUNT)
        if self.prompt and self.prompts:
            raise InputError("prompt and prompts are both given: type prompts, or name a list of them")
        asked = bool(self.prompt or self.prompts)
        if asked and self.labels != ("all",):
            raise InputError("labels name captions of the run, and prompts are given in their place; leave one of them out")
        if self.per_prompt > 1 and (not asked or self.count is not None):
            raise InputError("per_prompt has no effect: it is about --prompt or --prompts without --count; leave it out")
        if self.layout != "plain" and (not asked or self.out.suffix or is_features(self.prompts)):
            raise InputError(
                f"layout {self.layout} is about a folder of prompts: give --prompts with texts, and an --out without ending"
            )
        if self.layout == "captions" and self.first:
            raise InputError("layout captions counts its images from 0, and first is another number; leave it out")
        if self.out.suffix not in ("", ".png", ".npz"):
            raise InputError(f"out must end in .png or .npz, or be a folder without ending, got {self.out}")
        for name, usual in (("steps", 1), ("rounds", 0)):
            if (value := getattr(self, name)) != usual and self.method != "generator":
                raise InputError(f"{name} {value} goes with method generator only, not {self.method}")
        if self.method == "teacher" and self.prefix != "snapped":
            raise InputError("prefix would have no effect: it is about --steps 2 or more; leave it out")
        by_teacher = self.method == "teacher" or self.steps > 1
        if not by_teacher and (unused := [*self.given, *(["prefix"] if self.prefix != "snapped" else [])]):
            raise InputError(
                f"{', '.join(unused)} would have no effect: no teacher draws here, and what it was distilled to is in the "
                "generator's weights; leave it out, or give --steps 2 (or more), or --method teacher"
            )

    def check_seeds(self, count: int) -> None:
        """Refuse seeds beyond their range."""
        if not 0 <= self.seed < SEEDS or self.first < 0 or self.seed + self.first + count > SEEDS:
            raise InputError(f"seed must be in 0 to 2^62 - 1, with first and count added too, got {self.seed} and {self.first}")


def sample(config: SampleConfig) -> None:
    """Draw the images and write them.

    Raises:
        InputError: what is asked for is not there, or does not go together.
        Interrupted: by Ctrl-C; the images that were done are written, whole.
    """
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)  # refuses before anything is read
    prompts = _prompts(config)
    ways = _opened(replace(config, run=located(config.run)), prompts, device).in_precision(precision)
    if config.precision != "auto" and ways.precision != precision:
        say(f"note: drawn in {name_of(ways.precision)}, as a network is code of yours", sys.stderr)
    count = config.count or (config.per_prompt * ways.conditions.num_labels if prompts else USUAL_COUNT)
    config.check_seeds(count)
    labels = parse_labels(config.labels, ways.conditions, count, config.first)
    draw = _draw(config, ways)
    seeds = list(range(config.seed + config.first, config.seed + config.first + count))
    layout = _layout(config, prompts, count)
    if config.out.suffix and config.out.is_dir():
        raise InputError(f"out {config.out} is a folder; name a file, or a folder without ending")
    if config.out.is_dir() and any(config.out.iterdir()):
        raise InputError(f"out {config.out} is not empty: its old images would mix with the new; choose another --out")
    writable_folder(config.out.parent if config.out.suffix else config.out, "output folder")
    name = None if layout is None else (lambda number, label, seed: layout.name(number))
    writer = open_writer(config.out, config.first, name, keep_partial=True)
    drawn = ways.batches(draw, labels, seeds, config.batch, nearest=config.decoding == "nearest")
    done = 0
    try:
        with answering([signal.SIGTERM], _stop), writer, progress("sample", count, "img") as bar:
            for _, images in drawn:
                chosen = slice(done, done + len(images))
                writer.add(images, labels[chosen], seeds[chosen])
                done += len(images)
                bar.update(len(images))
    except KeyboardInterrupt:
        raise Interrupted(_stopped(config, writer.kept, count)) from None
    finally:
        if writer.kept and isinstance(prompts, Prompts) and not config.out.suffix:
            write_files(config.out, layout, config.first + writer.kept, _described(config, ways, prompts))
    say(f"wrote {count} images to {config.out} ({name_of(ways.precision)})")


def _stop(number: int, frame: object) -> None:
    """SIGTERM, which clusters send before they kill, is answered as Ctrl-C is."""
    raise KeyboardInterrupt


def _stopped(config: SampleConfig, kept: int, count: int) -> str:
    said = f"the first {kept} of {count} images are in {config.out}" if kept else "no image was done"
    if kept == count:
        return f"interrupted, but {said}"
    rest = f"--first {config.first + kept} --count {count - kept}"
    return f"interrupted: {said}; the rest: the same command with {rest} and another --out"


def _prompts(config: SampleConfig) -> Texts:
    """What to draw, where it is no labels: prompts, or the name of a file of features."""
    return typed(config.prompt) if config.prompt else listed(config.prompts)


def _layout(config: SampleConfig, prompts: Texts, count: int) -> Layout | None:
    """Where images go in a folder of somebody's scorer.

    Raises:
        InputError: the prompts lack what it is made of, or there is no room for so many images.
    """
    if config.layout == "plain" or not isinstance(prompts, Prompts):
        return None
    found = LAYOUTS[config.layout](prompts)
    found.check()
    found.name(config.first + count - 1)
    return found


def _described(config: SampleConfig, ways: Ways, prompts: Prompts) -> dict[str, object]:
    """What decides the images of prompts."""
    by_teacher = config.method == "teacher" or config.steps > 1
    return {
        **prompts.described(),
        "run": os.path.abspath(config.run),
        "generator": weights_digest(ways.generator.student),
        **({} if ways.teacher is None else {"teacher": ways.teacher.fingerprint()}),
        "first": config.first,
        "method": config.method,
        "steps": config.steps,
        "rounds": ways.generator.student.rounds,
        "sampling": ways.sampling.described() if by_teacher else "as distilled",
        "seeds": f"image i has seed {config.seed} + i, and prompt i modulo {len(prompts)}",
        "decoding": config.decoding,
        "precision": name_of(ways.precision),
        "commit": commit(),
    }


def _opened(config: SampleConfig, prompts: Texts, device: torch.device) -> Ways:
    """The networks that a method needs."""
    place = config.text_encoder
    if config.method in ("generator", "two_passes") and config.steps == 1:
        return Ways(open_generator(config.run, device, prompts, config.trust, place)).in_rounds(config.rounds)
    run = open_run(config.run, device, prompts, config.trust, place)
    sampling = config.applied(run.sampling)
    if sampling != run.sampling and (note := run.teacher.check(sampling)):
        say(f"note: {note}", sys.stderr)
    if config.method == "teacher" and (aligned := run.generator.tokenizer.aligned) is not None:
        say(f"note: the teacher's tokens are decoded by the run's decoder, {aligned}", sys.stderr)
    return Ways(run.generator, run.teacher, sampling, run.ar_diffusion, config.prefix).in_rounds(config.rounds)


def _draw(config: SampleConfig, ways: Ways) -> Draw:
    if config.method == "generator":
        return ways.few_steps(config.steps)
    return {"two_passes": ways.two_passes, "ar_diffusion": ways.ar_diffusion, "teacher": ways.by_teacher}[config.method]()


def parse_labels(entries: Sequence[str], conditions: Conditions, count: int, first: int = 0) -> list[int]:
    """The label of each of `count` images, the first of which has number `first`, from numbers and names.

    Args:
        entries: "all" alone, or labels; an entry that is no label itself may be several with commas between.
        conditions: that know them.
        count, first: which images.

    Raises:
        InputError: an entry is not a class.
    """
    if tuple(entries) == ("all",):
        chosen = list(range(conditions.num_labels))
    else:
        names = [name for entry in entries for name in ([entry] if entry in conditions.class_names else entry.split(","))]
        chosen = [conditions.label(name) for name in names]
    if not chosen:
        raise InputError("labels are empty; give classes, or all")
    return [chosen[index % len(chosen)] for index in range(first, first + count)]
