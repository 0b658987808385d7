"""CLIP's picture tower: states that were trained to tell which words go with a picture."""

from torch import Tensor, nn

from model.encoders import pictures
from model.encoders.vit import CLIP, TOWER, Vit, VitConfig, VitNet


class ClipNet(VitNet):
    """With a norm before the blocks, and one for class tokens alone after them."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__(config)
        self.first = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.norm = nn.Identity()
        self.pooled = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


class Clip(Vit):
    """Frames -> tokens of their patches after a class token, which with its norm is the vector of a frame.

    That is what comes before the projection that words and pictures share. `aspect` crop takes the middle of a picture,
    squash and pad all of it as for SigLIP. Everything else is as for every Vit.
    """

    name = "clip"
    hub = "openai/clip-vit-large-patch14"
    shape = VitConfig(hidden_act="quick_gelu", layer_norm_eps=1e-5, patch_size=32, patch_bias=False)
    family, part = "clip_vision_model", "vision_config"
    rules = (*CLIP, (TOWER + r"pre_layrnorm\.(.*)", r"first.\1"), (TOWER + r"post_layernorm\.(.*)", r"pooled.\1"))
    unused = (r"text_.*", r"visual_projection\..*", "logit_scale", r".*\.position_ids")
    statistics = "CLIP"
    net: ClipNet

    def __init__(
        self, folder: str, layer: str = "last", dtype: str = "fp32", frames: int = 16, aspect: str = "crop"
    ) -> None:
        self.resizing = pictures.aspect(aspect, ("crop", "squash", "pad"), self.name)
        own = {} if aspect == "crop" else {"aspect": aspect}  # stores made before there was a choice do not tell it
        super().__init__(folder, layer, dtype, frames=frames, **own)

    @staticmethod
    def network(config: VitConfig) -> ClipNet:
        return ClipNet(config)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Tokens (n, T, dim) of frames -> normed class tokens (n, dim)."""
        return self.net.pooled(tokens[:, 0])
