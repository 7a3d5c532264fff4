"""Pictures during training: the first images of a way to draw."""

from collections.abc import Callable

from torch import Tensor

from dd2.sampling import Draw
from dd2.teachers.base import Teacher

PREVIEW_IMAGES = 40


def previewed(teacher: Teacher, draw: Draw) -> Callable[[], Tensor]:
    """What draws images (N, channels, H, W) at the first labels and seeds, always the same, as a `Stage` wants it."""

    def preview() -> Tensor:
        cond = teacher.conditions.default(PREVIEW_IMAGES, teacher.device)
        return teacher.decode(draw(cond, range(len(cond))), cond)

    return preview
