"""Frozen encoders by name: what a clip's sound, picture or words become before a model sees them."""

import difflib
import importlib
import inspect
from typing import Any

from torch import Tensor, nn

from common.config import UserError

ENCODERS = {"logmel": "LogMel", "framestats": "FrameStats", "hashtext": "HashText"}  # module -> class


class Encoder(nn.Module):
    """What every encoder offers; forward(x, mask=None) gives a clip the same rows alone and in any batch.

    Audio is read at `sample_rate`, video as frames(pooling) pictures; `poolings` starts with the default.
    """

    name: str
    modality: str  # audio, video or text
    kind = "dense"  # or ids: integers for an embedding table of `dim` rows
    dim: int
    dtype = "float32"
    poolings: tuple[str, ...]
    weights_sha256: str | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def out_dim(self, pooling: str) -> int:
        """Width of a row after `pooling`."""
        return self.dim

    def encode(self, x: Any, pooling: str) -> Tensor:
        """The pooled features of one clip, which has no batch dimension."""
        raise NotImplementedError  # what a clip's input looks like differs by modality

    def info(self, pooling: str) -> dict[str, Any]:
        """How features are made, for the index of their store: enough to load() this encoder again."""
        made = {"encoder": self.name, "options": self.options, "weights_sha256": self.weights_sha256, "kind": self.kind}
        return {**made, **self.options, "pooling": pooling, "dim": self.out_dim(pooling), "dtype": self.dtype}


def load(name: str, folder: str | None = None, **options: Any) -> Any:
    """The frozen encoder `name` in evaluation mode; `folder` holds its weights, where it has any."""
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, 1)
        hint = f"nearest: {near[0]}; " if near else ""
        raise UserError(f"unknown encoder '{name}' ({hint}there are {', '.join(ENCODERS)})")
    if folder is not None:
        raise UserError(f"encoder {name} has no weights to load from {folder}")
    cls = getattr(importlib.import_module(f"model.encoders.{name}"), ENCODERS[name])
    allowed = list(inspect.signature(cls).parameters)
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise UserError(f"encoder {name} has no option {unknown[0]} (options: {', '.join(allowed) or 'none'})")
    return cls(**options).eval().requires_grad_(False)
