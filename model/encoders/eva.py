"""EVA's ViT-g: pictures as BLIP-2, MiniGPT-v2 and Emotion-LLaMA read them."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import UserError
from common.weights import locate
from model.encoders.vit import AUTHORS, Vit, VitConfig, VitNet, authors_shape, read_authors

FILE = "eva_vit_g.pth"
URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/" + FILE
DEPTH, HEAD = 39, 88  # blocks that are run of the file's 40; width of an attention head


class Eva(Vit):
    """Frames -> tokens of their 14 x 14 patches after a class token, which is the vector of a frame; keys have no bias.

    The file's positions are stretched to a picture of `image_size` pixels a side. Everything else is as for every Vit;
    the final norm is of the tokens alone and learned nothing.
    """

    name = "eva"
    hub = FILE  # a file, below weights/ or in the folder that is given
    poolings = ("patches", "frame", "mean", "frames")
    shape = VitConfig(
        1408, DEPTH, 16, 6144, layer_norm_eps=1e-6, image_size=448, patch_size=14, biases=(True, False, True, True)
    )
    rules = AUTHORS
    unused = (rf"blocks\.(?:{DEPTH}|[4-9]\d)\..*", r"(?:norm|fc_norm|head)\..*")
    resizing, statistics = "squash", "CLIP"

    def __init__(
        self, folder: str, layer: str = "last", dtype: str = "fp32", frames: int = 16, image_size: int = 448
    ) -> None:
        super().__init__(folder, layer, dtype, frames=frames, image_size=image_size)

    def locate(self, folder: str) -> Path:
        """The file, or a folder that holds it."""
        try:
            place = locate(folder, f"{self.name} weights")
        except UserError as error:
            raise UserError(f"{error}; they are published at {URL}") from None
        return place / FILE if (place / FILE).is_file() else place

    def read(self, place: Path) -> tuple[VitConfig, dict[str, Tensor]]:
        """Shape and tensors, with positions for pictures of image_size."""
        file, tensors = read_authors(place)
        size = self.options["image_size"]
        config = replace(self.shape, **authors_shape(tensors, HEAD) | {"num_hidden_layers": DEPTH, "image_size": size})
        if config.hidden_size % HEAD:
            raise UserError(f"{file}: not EVA's: no heads of {HEAD} in a width of {config.hidden_size}")
        if size < config.patch_size or size % config.patch_size:
            raise UserError(f"{self.name}: image_size: {size} is not a multiple of {config.patch_size}")
        if "pos_embed" in tensors:
            tensors["pos_embed"] = stretch(tensors["pos_embed"], size // config.patch_size)
        return config, tensors

    @staticmethod
    def network(config: VitConfig) -> VitNet:
        net = VitNet(config)
        net.norm = nn.LayerNorm(config.hidden_size, 1e-5, elementwise_affine=False)
        return net


def stretch(positions: Tensor, side: int) -> Tensor:
    """Positions (1 + g * g, D) of a class token and a square of patches -> (1 + side * side, D), bicubic."""
    given = math.isqrt(len(positions) - 1)
    if given == side or given**2 != len(positions) - 1:
        return positions
    patches = positions[1:].float().T.unflatten(1, (given, given))[None]
    patches = F.interpolate(patches, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1].float(), patches[0].flatten(1).T])
