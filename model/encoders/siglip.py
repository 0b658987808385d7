"""SigLIP's picture tower, as video language models read it: patches alone, one layer before the last."""

from torch import Tensor

from model.encoders import pictures
from model.encoders.vit import CLIP, TOWER, Vit, VitConfig


class Siglip(Vit):
    """Frames -> tokens of their patches, whose mean is the vector of a frame; the published pooling head is not read.

    `aspect` squash makes a square of the whole picture, pad puts it on a grey one. Everything else is as for every Vit.
    """

    name = "siglip"
    hub = "google/siglip-so400m-patch14-384"
    shape = VitConfig(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, class_token=False)
    family, part = "siglip_vision_model", "vision_config"
    rules = (*CLIP, (TOWER + r"post_layernorm\.(.*)", r"norm.\1"))
    unused = (TOWER + r"head\..*", r"text_model\..*", r"logit_(?:scale|bias)", r".*\.position_ids")
    statistics = "halves"

    def __init__(
        self, folder: str, layer: str = "-2", dtype: str = "fp32", frames: int = 16, aspect: str = "squash"
    ) -> None:
        self.resizing = pictures.aspect(aspect, ("squash", "pad"), self.name)
        super().__init__(folder, layer, dtype, frames=frames, aspect=aspect)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Tokens (n, T, dim) of frames -> their means (n, dim)."""
        return tokens.mean(1)
