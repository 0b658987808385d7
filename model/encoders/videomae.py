"""VideoMAE: short films in states that were trained to fill in what is hidden of them."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from model.encoders.transformer import mix
from model.encoders.vit import AUTHORS, VIT, Vit, VitConfig, authors_shape, read_authors


class VideoMae(Vit):
    """Sixteen frames of a clip -> tokens of boxes of 16 x 16 pixels by 2 frames, time after time; positions are waves.

    Pooled to the mean of all tokens, or of those of each time (8, dim). The folder is one of transformers, or holds
    the authors' .pth. `layer` and `dtype` are as for every Vit; a model that was trained to classify has no final norm.
    """

    name = "videomae"
    hub = "MCG-NJU/videomae-large"
    poolings = ("mean", "frames")
    shape = VitConfig(
        num_frames=16, tubelet_size=2, use_mean_pooling=True, class_token=False, biases=(True, False, True, True),
        learned=False,
    )  # fmt: skip
    family = "videomae"
    rules = VIT + AUTHORS
    unused = (r"decoder\..*", r"encoder_to_decoder\..*", "mask_token", r"(?:fc_norm|classifier|head)\..*")
    resizing, mode, statistics = "crop", "bilinear", "ImageNet"

    def __init__(self, folder: str, layer: str = "last", dtype: str = "fp32") -> None:
        super().__init__(folder, layer, dtype)
        self.count = self.config.num_frames

    def read(self, place: Path) -> tuple[VitConfig, dict[str, Tensor]]:
        if (place / "config.json").is_file():
            return super().read(place)
        _, tensors = read_authors(place, "encoder.")
        pooled = "fc_norm.weight" in tensors
        return replace(self.shape, **authors_shape(tensors), use_mean_pooling=pooled), tensors

    def lengths(self, frames: Tensor) -> Tensor:
        """Rows of clips of so many frames, of which all have the same."""
        return frames // self.count * self.config.tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prepared frames (B, 16, 3, S, S) -> (B, T, dim); no clip has fewer, so mask says nothing."""
        return mix(self.net.states(x.transpose(1, 2)), self.layers)

    def pool(self, rows: Tensor, how: str) -> Tensor:
        """Tokens (T, dim) of one clip -> their mean (dim,), or that of each time (8, dim)."""
        times = rows.unflatten(0, (self.count // self.config.tubelet_size, -1)).mean(1)
        return times if how == "frames" else times.mean(0)
