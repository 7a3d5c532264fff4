"""dd2 convert: official checkpoints to dd2's own folders of safetensors and JSON."""

from dataclasses import dataclass
from pathlib import Path

from dd2.checkpoints.native import save_teacher
from dd2.checkpoints.var import PATCH_NUMS_256, load_var
from dd2.errors import InputError


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
    print(f"wrote teacher folder {config.out}; look at it with dd2 inspect {config.out}")
    return config.out


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"out {out} exists already; name a new folder with --out")
