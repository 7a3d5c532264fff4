"""A distilled generator for use: labels and seeds in, images out."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import dd2.baselines  # noqa: F401  (folders may hold their networks)
from dd2.checkpoints.runs import open_generator
from dd2.device import pick_device
from dd2.errors import InputError
from dd2.generator import Generator
from dd2.precision import Precision, pick_precision
from dd2.sampling import Ways


class OneStepPipeline:
    """One forward pass per batch of images.

    Args:
        generator: the distilled network and its tokenizer, on one device.
        dtype: the arithmetic that it draws in.
    """

    def __init__(self, generator: Generator, dtype: torch.dtype = torch.float32) -> None:
        self.generator = generator
        self._ways = Ways(generator).in_precision(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic that it draws in."""
        return self._ways.precision

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        captions: str = "",
        trust: Sequence[str] = (),
        dtype: Precision = "auto",
        revision: str | None = None,
    ) -> "OneStepPipeline":
        """Load a run folder, a generator folder, or a Hugging Face repository that holds one.

        Args:
            name: a path, or "owner/name" on the Hub (needs `pip install "dd2[hub]"`).
            device: auto, cpu, cuda or cuda:N.
            captions: for text-conditional models, a file of dd2 text-features; labels are its rows. By default the run's.
            trust: modules of yours that the generator may import, because its teacher was module:function.
            dtype: "float32", "bfloat16", "float16" (CUDA), or "auto": bfloat16 where the device computes in it.
            revision: of a repository on the Hub: a commit, which never changes, a tag or a branch.

        Raises:
            InputError: there is nothing to load, or it is damaged.
        """
        path = Path(name)
        if not path.exists() and str(name).count("/") == 1:
            path = _download(str(name), revision)
        elif revision is not None:
            raise InputError(f"revision {revision} is about repositories on the Hub; {name} is a folder here")
        place = pick_device(device)
        precision = pick_precision(dtype, place)
        return cls(open_generator(path, place, captions, trust), precision)

    def __call__(self, labels: Sequence[int | str], seeds: Sequence[int] | None = None, *, nearest: bool = False) -> Tensor:
        """Draw one image per label.

        Args:
            labels: B classes by number or name, or rows of the captions.
            seeds: B seeds, one per image; 0 … B - 1 by default.
            nearest: snap tokens to their nearest codes before decoding.

        Returns:
            Images (B, channels, H, W) in [-1, 1], on the CPU.

        Raises:
            InputError: a label is not a class, or the seeds are not one per image.
        """
        seeds = range(len(labels)) if seeds is None else seeds
        if len(seeds) != len(labels):
            raise InputError(f"one seed per label is needed: {len(labels)} labels, {len(seeds)} seeds")
        generator = self.generator
        if len(labels) == 0:
            raise InputError("labels are empty; give one class per image")
        numbers = [generator.conditions.label(label) for label in labels]
        with torch.inference_mode():
            cond = generator.conditions(torch.tensor(numbers, device=generator.device))
            tokens = self._ways.one_step()(cond, seeds)
            return self._ways.decode(generator.snap(tokens) if nearest else tokens, cond).clamp(-1, 1).cpu()


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f'{name} is no folder here; to load it from the Hub, pip install "dd2[hub]"') from error
    return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
