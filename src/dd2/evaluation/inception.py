"""ADM's Inception as the TorchScript file that NVIDIA publishes: features of FID, sFID and the inception score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dd2.errors import InputError
from dd2.files import file_digest

SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Of inception-2015-12-05.pt; resize included."""

URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

SIDE = 299
"""Pixels that the network resizes to."""

SPATIAL_CHANNELS = 7
"""Channels of a feature map that sFID uses (ADM's evaluator)."""

BEFORE_MIXED_6 = (
    *("conv", "conv_1", "conv_2", "pool0", "conv_3", "conv_4", "pool1"),
    *("mixed", "mixed_1", "mixed_2", "mixed_3", "mixed_4", "mixed_5"),
)
"""The file's layers up to the block whose first convolution sFID reads (mixed_6/conv of ADM's graph)."""


class Inception:
    """The verified network.

    Args:
        file: inception-2015-12-05.pt.
        device: where it runs.

    Attributes:
        digest: SHA-256 of the file.
        spatial: whether it gives the spatial features of sFID. The file's own call does not; its layers are run one by one for
            them, on a resize of ours, if that gives the file's own pooled features to 1e-3.

    Raises:
        InputError: the file is missing, or is not the published one.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        if not file.is_file():
            raise InputError(f"features {file} do not exist; give the path of inception-2015-12-05.pt, or inception to fetch it")
        self.digest = file_digest(file)
        if self.digest != SHA256:
            raise InputError(
                f"features {file} have SHA-256 {self.digest}, not {SHA256} of inception-2015-12-05.pt: it is damaged or another "
                "file; for a network of your own give module:function"
            )
        self._network = torch.jit.load(str(file), map_location=device).eval()
        self.spatial = self._layers_agree(device)

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 1 or 3, H, W) in [-1, 1] -> "pool" (B, 2048), "probabilities" without the output bias (B, 1008), and
        "spatial" (B, 17 * 17 * 7).

        Not rounded here: an evaluation has rounded them to bytes before, a path length must not.
        """
        pixels = ((images + 1) * 127.5).clamp(0, 255)
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        found = {
            "pool": self._network(pixels, return_features=True),
            "probabilities": self._network(pixels, no_output_bias=True),
        }
        if self.spatial:
            maps = self._mixed_6(pixels)[:, :SPATIAL_CHANNELS]
            found["spatial"] = maps.permute(0, 2, 3, 1).flatten(1)  # ADM's order, so that its mu_s and sigma_s fit
        return found

    def read_clean(self, pixels: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, 299, 299) in [0, 255], resized outside as clean-fid does, -> "pool" (B, 2048): the file's layers alone.

        Raises:
            InputError: the file gives no access to them.
        """
        layers: Callable[[Tensor], Tensor] | None = getattr(self._network, "layers", None)
        if layers is None:
            raise InputError("this Inception file has no layers of its own, which clean-fid's resize needs; give NVIDIA's")
        return {"pool": layers((pixels.float() - 128) / 128).flatten(1)}

    def _mixed_6(self, pixels: Tensor) -> Tensor:
        layers: Any = self._network.layers
        x = resized(pixels)
        for name in BEFORE_MIXED_6:
            x = getattr(layers, name)(x)
        return layers.mixed_6.conv(x)

    @torch.no_grad()
    def _layers_agree(self, device: torch.device) -> bool:
        """Whether our resize, followed by the file's layers, is what the file itself computes."""
        layers: Callable[[Tensor], Tensor] | None = getattr(self._network, "layers", None)
        if layers is None or not all(hasattr(layers, name) for name in (*BEFORE_MIXED_6, "mixed_6")):
            return False
        pixels = 255 * torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0)).to(device)
        own = self._network(pixels, return_features=True)
        return torch.allclose(layers(resized(pixels)).view_as(own), own, rtol=1e-3, atol=1e-3)


def resized(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 255] as the layers read them: (x - 128) / 128 at 299 x 299.

    TensorFlow 1's bilinear resize, whose sample points start in the corner of the first pixel instead of half a pixel within.
    """
    batch, channels, height, width = pixels.shape
    theta = torch.eye(2, 3, device=pixels.device)
    theta[0, 2], theta[1, 2] = 1 / width - 1 / SIDE, 1 / height - 1 / SIDE
    grid = F.affine_grid(theta.expand(batch, 2, 3), [batch, channels, SIDE, SIDE], align_corners=False)
    return (F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False) - 128) / 128
