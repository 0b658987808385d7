"""Pictures as vision transformers read them: resized as Pillow does, made square, and scaled by channel.

All take and give (n, 3, H, W); the integers of uint8 on the CPU until scale().
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.config import UserError

# mean and deviation of red, green and blue, by the name that an index gives them
STATISTICS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "halves": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def resize(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Bilinear or bicubic over as many pixels as one of the result covers: within 2 of 255 grey levels of Pillow's."""
    return F.interpolate(x, (height, width), mode=mode, antialias=True)


def squash(x: Tensor, size: int, mode: str) -> Tensor:
    """The whole picture as a square, whatever its sides were."""
    return resize(x, size, size, mode)


def crop(x: Tensor, size: int, mode: str) -> Tensor:
    """The middle of the picture, its shorter side whole."""
    short = min(x.shape[2:])
    height, width = (size * side // short for side in x.shape[2:])
    top, left = (height - size) // 2, (width - size) // 2
    return resize(x, height, width, mode)[..., top : top + size, left : left + size]


def pad(x: Tensor, size: int, mode: str, grey: int = 127) -> Tensor:
    """The whole picture as it is, in the middle of a square of one grey."""
    height, width = x.shape[2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    border = (left, side - width - left, top, side - height - top)
    return squash(F.pad(x, border, value=grey), size, mode)


def aspect(given: str, allowed: Sequence[str], where: str) -> str:
    """The function that makes a picture square, if it is among the `allowed` ones."""
    if given not in allowed:
        raise UserError(f"{where}: aspect '{given}' is not one of {', '.join(allowed)}")
    return given


def scale(x: Tensor, statistics: str) -> Tensor:
    """Grey levels -> float32 from 0 to 1, less their mean, over their deviation."""
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in STATISTICS[statistics])
    return ((x.float() / 255 - mean) / deviation).contiguous()
