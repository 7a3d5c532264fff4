"""The model as a diffusers pipeline: DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True). Needs dd2."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from dd2 import OneStepPipeline


class DD2Pipeline(DiffusionPipeline):
    """Images of classes in one step.

    Args:
        tokenizer: tells where the model's folder is (dd2_folder.py).
    """

    def __init__(self, tokenizer) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer)
        self.dd2 = OneStepPipeline.from_pretrained(tokenizer.path, device="cpu", dtype="float32")

    def to(self, *args: object, **kwargs: object) -> "DD2Pipeline":
        """Bring it to a device, a dtype, or both."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        name = str(dtype or self.dd2.dtype).removeprefix("torch.")
        self.dd2 = OneStepPipeline.from_pretrained(self.tokenizer.path, device=str(device or self.device), dtype=name)
        return self

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.dd2.device

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per label; the arguments are those of dd2.OneStepPipeline."""
        drawn = self.dd2(
            class_labels,
            generator=generator,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
        )
        return ImagePipelineOutput(images=drawn.images) if return_dict else (drawn.images,)
