"""Frozen encoders by name: what a clip's sound, picture or words become before a model sees them."""

import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.config import UserError
from common.options import Option, read
from common.weights import find_weights, full_sha256, identity, model_files

ENCODERS = {  # module -> class
    "logmel": "LogMel",
    "framestats": "FrameStats",
    "hashtext": "HashText",
    "auristream": "AuriStream",
    "wavcoch": "WavCoch",
    "embeddinggemma": "EmbeddingGemma",
    "hubert": "Hubert",
    "wav2vec2": "Wav2Vec2",
    "beats": "Beats",
    "bert": "Bert",
    "vitmae": "VitMae",
    "videomae": "VideoMae",
    "eva": "Eva",
    "clip": "Clip",
    "siglip": "Siglip",
}


class Encoder(nn.Module):
    """What every encoder offers; forward(x, mask=None) gives a clip the same rows alone and in any batch.

    Audio is read at `sample_rate`, video as frames(pooling) pictures; `poolings` starts with the default. Those whose
    clips pay to be encoded together are `batched`: prepare() makes of each clip what forward() takes without its batch
    dimension, lengths() says how many of the rows are the clip's, and pool() makes its features of them.
    """

    name: str
    modality: str  # audio, video or text
    batched = False
    kind = "dense"  # or ids: integers for an embedding table of `dim` rows
    dim: int
    dtype = "float32"
    poolings: tuple[str, ...]
    hub: str | None = None  # where its weights are published; its first option is then the folder that holds them
    weights_sha256: dict[str, str] | None = None  # of every file that its output depends on
    preprocessing: str | None = None  # what prepare() does, in words
    coverage: str | None = None  # how many tensors of its files it took

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def out_dim(self, pooling: str) -> int:
        """Width of a row after `pooling`."""
        return self.dim

    def prepare(self, x: Any) -> Tensor:
        """What forward() takes of a decoded clip."""
        raise NotImplementedError  # what a clip's input looks like differs by modality

    def pool(self, rows: Tensor, how: str) -> Tensor:
        """Rows (T, D) of one clip -> its features."""
        return rows.mean(0) if how == "mean" else rows

    def encode(self, x: Any, pooling: str) -> Tensor:
        """The pooled features of one clip, which has no batch dimension; on the CPU, wherever the weights are."""
        device = next(self.parameters()).device
        return self.pool(self(self.prepare(x)[None].to(device))[0], pooling).cpu()

    def info(self, pooling: str) -> dict[str, Any]:
        """How features are made, for the index of their store: enough to load() this encoder again."""
        made = {"encoder": self.name, "options": self.options, "weights_sha256": self.weights_sha256, "kind": self.kind}
        if self.preprocessing is not None:
            made["preprocess"] = self.preprocessing
        return {**made, **self.options, "pooling": pooling, "dim": self.out_dim(pooling), "dtype": self.dtype}


def find(name: str) -> type[Encoder]:
    """The class of encoder `name`."""
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, 1)
        hint = f"nearest: {near[0]}; " if near else ""
        raise UserError(f"unknown encoder '{name}' ({hint}there are {', '.join(ENCODERS)})")
    return getattr(importlib.import_module(f"model.encoders.{name}"), ENCODERS[name])


def takes(name: str, option: str) -> bool:
    """Whether encoder `name` has an option."""
    return option in inspect.signature(find(name)).parameters


def load(name: str, folder: str | None = None, **options: Any) -> Any:
    """The frozen encoder `name` in evaluation mode; options may be text, as flags give them.

    `folder` holds its weights, where it has any: a path or a hub name, by default where they are published.
    """
    cls = find(name)
    if folder is not None and cls.hub is None:
        raise UserError(f"encoder {name} has no weights to load from {folder}")
    allowed = dict(inspect.signature(cls).parameters)
    allowed.pop("folder", None)
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise UserError(f"encoder {name} has no option {unknown[0]} (options: {', '.join(allowed) or 'none'})")
    for option, given in options.items():
        try:
            options[option] = _read(given, allowed[option])
        except ValueError as error:
            raise UserError(f"encoder {name}: {option}: {error}") from None
    if cls.hub is not None:
        options["folder"] = folder or cls.hub
    return cls(**options).eval().requires_grad_(False)


def _read(given: Any, parameter: inspect.Parameter) -> Any:
    """The value of an option, maybe given as text, in the type of its parameter; ValueError if it is none."""
    kinds = [kind for kind in typing.get_args(parameter.annotation) if kind is not type(None)]
    return read(given, Option(parameter.name, (kinds or [parameter.annotation])[0], None, bool(kinds), None))


def portable(given: str, folder: Path) -> str:
    """The name that an index gives to the weights that `given` led to: their hub name where that leads there too."""
    name = identity(folder)["name"]
    try:
        return name if "/" in name and find_weights(name).samefile(folder) else given
    except UserError:
        return given


def sha256(folder: Path, *beside: str) -> dict[str, str]:
    """File -> sha256, of the folder's tensors and of those of the files `beside` them that are there."""
    names = sorted({*(path.name for path in model_files(folder)), *beside})
    return {name: full_sha256(folder / name)[Path(name).name] for name in names if (folder / name).is_file()}


def listing(names: Iterable[str]) -> str:
    """All of these tensor names in one line; where they are many, the same one of every layer once, its number a *."""
    names = list(names)
    return ", ".join(names if len(names) <= 8 else dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
