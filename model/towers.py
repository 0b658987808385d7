"""MultiMood's streams: the frozen towers that see and hear a client's turn, and what connects them to words."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.config import UserError, opt
from model import encoders
from model.encoders.framestats import PATCH
from model.stc import AUDIO, VIDEO, tokens

EYES = ("siglip", "clip")  # encoders that a tower's name tells
ASPECTS = {"pad": "pad", "square": "squash"}


@dataclass
class TowerConfig:
    vision_tower: str | None = opt(
        None, "frozen encoder of the client's video: a SigLIP or CLIP by folder or hub name, or framestats",
        "--vision-tower",
    )  # fmt: skip
    mm_projector_type: str = opt(
        "stc_connector_v35", "what joins patches of frames to tokens", "--mm-projector-type", choices=VIDEO
    )
    num_frames: int = opt(8, "frames of all clips of a turn together", "--num-frames", span=(1, 32))
    mm_vision_select_layer: str = opt("-2", "layer of the vision tower whose states are taken")
    image_aspect_ratio: str = opt(
        "pad", "pad: a frame on a grey square; square: squashed to one", choices=("pad", "square")
    )
    patches: int = opt(729, "patches that the vision tower makes of a frame")
    vision_width: int = opt(1152, "width of a patch")
    audio_tower: str | None = opt(
        None, "frozen encoder of the client's voice: a BEATs by file, folder or hub name, or logmel", "--audio-tower"
    )
    mm_projector_a_type: str = opt("linear", "what makes tokens of sound", choices=AUDIO)
    audio_seconds: float = opt(30.0, "seconds of sound that the audio tower hears, silence after a shorter turn's")
    audio_windows: bool = opt(
        False, "hear eight windows of 2 s, spread over a turn, as VideoLLaMA2 does, in place of all of it"
    )
    audio_tokens: int = opt(1496, "tokens that the audio tower makes of that")
    audio_width: int = opt(768, "width of such a token")
    mamba_compressor: str | None = opt(
        None, "compressor of the history: a Mamba, or a compressor that was trained, by folder or hub name",
        "--mamba-compressor",
    )  # fmt: skip
    freeze_mamba_compressor: bool = opt(False, "train no more than the projection of the compressor's memory")
    pretrain_projectors_repo: str | None = opt(
        None, "start the connectors of video and sound from this VideoLLaMA2, by folder, file or hub name"
    )

    @property
    def frozen_compressor(self) -> str | None:
        """The compressor whose weights a checkpoint does not hold."""
        return self.mamba_compressor if self.freeze_mamba_compressor else None


def load_towers(cfg: TowerConfig, device: torch.device) -> tuple[Any, Any]:
    """The frozen encoders of video and of sound, on the device; None for one that is not asked for.

    UserError: a name that is none, no weights, or patches that do not suit the connector.
    """
    return load_eye(cfg, device), load_ear(cfg, device)


def load_eye(cfg: TowerConfig, device: torch.device) -> Any:
    """The encoder of video, with film(); one without weights stays on the CPU and squashes what it sees."""
    name = cfg.vision_tower
    if name is None:
        return None
    tokens(cfg.mm_projector_type, cfg.num_frames, cfg.patches)  # fails here rather than after weights are read
    if name == "framestats":
        return encoders.load(name, image_size=PATCH * math.isqrt(cfg.patches))
    told = (part.lower() for part in (Path(name).name, name))  # a folder above may be called like another tower
    kind = next((eye for part in told for eye in EYES if eye in part), None)
    if kind is None:
        raise UserError(f"--vision-tower: '{name}' is not framestats, nor a SigLIP or CLIP, whose name says so")
    options = {"layer": cfg.mm_vision_select_layer, "aspect": ASPECTS[cfg.image_aspect_ratio], "dtype": dtype(device)}
    return encoders.load(kind, name, **options).to(device)


def load_ear(cfg: TowerConfig, device: torch.device) -> Any:
    """The encoder of sound; one without weights stays on the CPU."""
    name = cfg.audio_tower
    if name is None:
        return None
    if name == "logmel":
        return encoders.load(name)
    try:
        return encoders.load("beats", name, dtype=dtype(device)).to(device)
    except UserError as error:
        raise UserError(f"--audio-tower: {error}; it is logmel, or a BEATs by file, folder or hub name") from None


def dtype(device: torch.device) -> str:
    """What products are made in."""
    return "bf16" if device.type == "cuda" else "fp32"
