"""dd2 convert: official checkpoints to dd2's own folders of safetensors and JSON."""

from dataclasses import dataclass
from pathlib import Path

from dd2.checkpoints.llamagen import load_llamagen
from dd2.checkpoints.mar import load_mar, weights_of
from dd2.checkpoints.native import save_teacher
from dd2.checkpoints.var import PATCH_NUMS_256, load_var
from dd2.errors import InputError
from dd2.processes import say


@dataclass(frozen=True)
class ConvertVarConfig:
    """Convert official VAR files to a teacher folder, which dd2 distill --teacher reads.

    Every tensor is accounted for; sizes and flags are read off the files. Files with more than tensors in them are refused.
    """

    transformer: Path
    """E.g. var_d16.pth, or a training checkpoint (trainer.var_wo_ddp); .pth, .pt or .safetensors."""
    vqvae: Path
    """E.g. vae_ch160v4096z32.pth."""
    out: Path
    """Folder to write; it must not exist yet."""
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    """Sides of the token maps (512 px models: 1 2 3 4 6 9 13 18 24 32)."""
    num_heads: int | None = None
    """Attention heads, where the file does not tell them (models without q/k norm)."""


def convert_var(config: ConvertVarConfig) -> Path:
    """Write the teacher folder."""
    _refuse_existing(config.out)
    teacher = load_var(config.transformer, config.vqvae, patch_nums=config.patch_nums, num_heads=config.num_heads)
    save_teacher(config.out, teacher)
    say(f"wrote teacher folder {config.out}; look at it with dd2 inspect {config.out}")
    return config.out


@dataclass(frozen=True)
class ConvertLlamaGenConfig:
    """Convert official LlamaGen files, class- or text-conditional, to a teacher folder, which dd2 distill --teacher reads.

    Every tensor is accounted for; sizes are read off the files. The teacher takes exact codes only: dd2 adapt, or the
    stage 0 of dd2 distill, gives it a continuous input layer.
    """

    gpt: Path
    """E.g. c2i_L_256.pt or t2i_XL_stage1_256.pt; .pt, .pth or .safetensors."""
    vq: Path
    """E.g. vq_ds16_c2i.pt."""
    out: Path
    """Folder to write; it must not exist yet."""
    num_heads: int | None = None
    """Attention heads, for other widths than the released ones."""
    image_size: int | None = None
    """Pixels the transformer was trained at (256, 384, 512); None takes it from the file's name, else 256."""


def convert_llamagen(config: ConvertLlamaGenConfig) -> Path:
    """Write the teacher folder."""
    _refuse_existing(config.out)
    teacher = load_llamagen(config.gpt, config.vq, num_heads=config.num_heads, image_size=config.image_size)
    save_teacher(config.out, teacher)
    say(f"wrote teacher folder {config.out}; look at it with dd2 inspect {config.out}, give it a continuous input with dd2 adapt")
    return config.out


@dataclass(frozen=True)
class ConvertMarConfig:
    """Convert official MAR files to a teacher folder.

    Every tensor is accounted for; sizes are read off the files. Of a checkpoint with several sets of weights the average
    (model_ema) is taken, which the official evaluation uses.
    """

    mar: Path
    """E.g. mar_base/checkpoint-last.pth or mar-base.safetensors."""
    vae: Path
    """E.g. kl16.ckpt or kl16.safetensors; that of LTH14/mar, not the original kl-f16 of latent diffusion."""
    out: Path
    """Folder to write; it must not exist yet."""
    num_heads: int | None = None
    """Attention heads, for other widths than the released ones."""


def convert_mar(config: ConvertMarConfig) -> Path:
    """Write the teacher folder."""
    _refuse_existing(config.out)
    taken = weights_of(config.mar)
    teacher = load_mar(config.mar, config.vae, num_heads=config.num_heads)
    save_teacher(config.out, teacher)
    say(f"wrote teacher folder {config.out} of {taken}; look at it with dd2 inspect {config.out}")
    return config.out


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"out {out} exists already; name a new folder with --out")
