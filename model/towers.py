"""MultiMood's streams: the frozen towers that see and hear a client's turn, and what connects them to words."""

from dataclasses import dataclass

from common.config import opt
from model.stc import AUDIO, VIDEO


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
