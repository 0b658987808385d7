"""Log-mel spectrogram frames, or a fixed vector of their statistics over a clip; has no weights."""

import torch
from torch import Tensor, nn

from model.encoders import Encoder

WINDOW, HOP, MELS, CEPSTRA = 512, 160, 64, 20  # 32 ms windows every 10 ms
FLOOR = 1e-4  # power added before the logarithm: silence and codec noise below it count for nothing
DELTA = 9  # frames of the slow slope, 90 ms, about half a syllable


class LogMel(Encoder):
    """Waveform at 16 kHz -> log10 mel power, 100 frames a second; every frame sees its own samples only."""

    name, modality = "logmel", "audio"
    sample_rate = 16000
    dim = MELS
    poolings = ("stats", "frames")
    mel: Tensor
    dct: Tensor
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchaudio.functional import create_dct, melscale_fbanks

        mel = melscale_fbanks(WINDOW // 2 + 1, 20.0, self.sample_rate / 2, MELS, self.sample_rate)
        self.register_buffer("mel", mel)
        self.register_buffer("dct", create_dct(CEPSTRA, MELS, "ortho"))
        self.register_buffer("window", torch.hann_window(WINDOW))

    def out_dim(self, pooling: str) -> int:
        """504 for statistics, 64 for frames."""
        return 6 * (MELS + CEPSTRA) if pooling == "stats" else MELS

    def lengths(self, samples: Tensor) -> Tensor:
        """Frames of clips that have so many samples; a clip shorter than one window has one."""
        return 1 + (samples.clamp_min(WINDOW) - WINDOW) // HOP

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Waveforms (B, S), mask (B, S) of their own samples -> (B, T, 64), zero after each clip's last frame."""
        if mask is not None:
            x = x * mask
        x = nn.functional.pad(x, (0, max(WINDOW - x.shape[1], 0)))
        spectrum = torch.stft(x, WINDOW, HOP, window=self.window, center=False, return_complex=True)  # (B, F, T)
        power = spectrum.real.square() + spectrum.imag.square()
        frames = (power.transpose(1, 2) @ self.mel + FLOOR).log10()  # (B, T, 64)
        if mask is None:
            return frames
        inside = torch.arange(frames.shape[1], device=x.device) < self.lengths(mask.sum(1))[:, None]
        return frames * inside[..., None]

    def pool(self, frames: Tensor, how: str) -> Tensor:
        """Frames (T, 64) of one clip -> themselves, or (504,) statistics of log-mel and cepstrum.

        They are mean and deviation over time, and deviation and mean size of the step between neighbouring frames and
        of the slope over 90 ms: level, colour and range of the voice, and how fast it moves.
        """
        if how == "frames":
            return frames
        from torchaudio.functional import compute_deltas

        bands = torch.cat([frames, frames @ self.dct], 1)  # (T, 84)
        step = bands.diff(dim=0, prepend=bands[:1])
        slope = compute_deltas(bands.T, DELTA).T
        parts = [bands.mean(0), *(part.std(0, correction=0) for part in (bands, step, slope))]
        return torch.cat([*parts, step.abs().mean(0), slope.abs().mean(0)])

    def encode(self, x: Tensor, pooling: str = "stats") -> Tensor:
        """One waveform (S,) -> (504,) or (T, 64)."""
        return self.pool(self(x[None])[0], pooling)
