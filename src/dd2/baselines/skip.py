"""skip-m: the teacher without its last m AR steps (Table 1)."""

from collections.abc import Sequence

from torch import Tensor

from dd2.errors import InputError
from dd2.order import Order
from dd2.teachers.code import CodeTeacher
from dd2.teachers.filtering import Sampling


def skipped(teacher: CodeTeacher, cond: Tensor, sampling: Sampling, seeds: Sequence[int], skip: int) -> Tensor:
    """Images (B, channels, H, W) of the teacher's first steps alone, one seed per image.

    The codes it draws are those of the whole sequence with the same seed. What stands for the missing tokens is the tokenizer's
    matter: scales add nothing, tokens of a raster are the average code.

    Raises:
        InputError: skip is not in 1 … S - 1.
    """
    kept = kept_steps(teacher.order, skip)
    ids = teacher.generate(cond, sampling, seeds, last_step=kept)
    return teacher.tokenizer.decode_first(teacher.tokenizer.codebook[ids], teacher.backbone.token_mean)


def kept_steps(order: Order, skip: int) -> int:
    """How many steps are left.

    Raises:
        InputError: none is, or none is skipped.
    """
    if not 1 <= skip < order.num_steps:
        raise InputError(f"skip must be 1 to {order.num_steps - 1}, as the teacher has {order.num_steps} AR steps, got {skip}")
    return order.num_steps - skip
