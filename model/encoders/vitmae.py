"""ViT-MAE: pictures in states that were trained to fill in what is hidden of them."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from common.config import UserError
from model.encoders.vit import AUTHORS, VIT, Vit, VitConfig, authors_shape, read_authors


class VitMae(Vit):
    """Frames -> tokens of their 16 x 16 patches, all of them seen, after a class token.

    The vector of a frame is that class token, or with `vector` mean the mean of its patches. The folder is one of
    transformers, or holds the authors' .pth. MER2023's FaceMAE read frames of faces that were not `normalize`d.
    Everything else is as for every Vit.
    """

    name = "vitmae"
    hub = "facebook/vit-mae-large"
    family = "vit_mae"
    rules = VIT + AUTHORS
    unused = (r"decoder[._].*", "mask_token", r"head\..*")
    resizing, mode = "squash", "bilinear"

    def __init__(
        self, folder: str, layer: str = "last", dtype: str = "fp32", frames: int = 16, vector: str = "cls",
        normalize: bool = True,
    ) -> None:  # fmt: skip
        if vector not in ("cls", "mean"):
            raise UserError(f"{self.name}: vector '{vector}' is not one of cls, mean")
        self.statistics = "ImageNet" if normalize else "none"
        super().__init__(folder, layer, dtype, frames=frames, vector=vector, normalize=normalize)

    def read(self, place: Path) -> tuple[VitConfig, dict[str, Tensor]]:
        if (place / "config.json").is_file():
            return super().read(place)
        _, tensors = read_authors(place)
        return replace(self.shape, **authors_shape(tensors)), tensors

    def vectors(self, tokens: Tensor) -> Tensor:
        """Tokens (n, T, dim) of frames -> class tokens, or means of patches (n, dim)."""
        return tokens[:, 1:].mean(1) if self.options["vector"] == "mean" else super().vectors(tokens)
