"""Speed and memory of extract.py's HuBERT beside transformers' in a padded loop, on the same clips and random weights.

The clips are noise as long as utterances of MELD, drawn with a seed from its lists (--meld DIR), or from a log-normal
distribution of about their median and spread. Both keep every frame of the last layer. Each variant runs in a process
of its own and they take turns; the times leave out imports and loading weights, the memory leaves out imports.

ours          data.extraction.extract into a store, as extract.py calls it
transformers  its feature extractor and HubertModel on 8 clips at a time in the order of the files, padded to the
              longest, one .npy a clip
checks        the largest difference of either from transformers' own states of each clip alone

$ python bench/extract.py --meld datasets/MELD
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # run by path: start again as a module, so that the repository is found and not bench/
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    again = [sys.executable, "-P", "-m", "bench.extract", *sys.argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})

import numpy as np
import soundfile
import torch

from bench.report import apart, header, memory, publish, spread, table, turns
from common import dist
from common.config import UserError, opt, run
from data.extraction import extract
from data.features import FeatureStore
from data.manifest import Clip, csv_rows
from model import encoders

RATE = 16000
BATCH = 8  # of transformers' loop
LONGEST = 30.0  # seconds; a few of MELD's times are mistyped
MEDIAN, SPREAD = 2.4, 0.75  # seconds, and deviation of their logarithm


@dataclass
class Config:
    clips: int = opt(200, "how many clips", "--clips")
    meld: str | None = opt(None, "folder with MELD's three CSV files, which say how long utterances are", "--meld")
    seed: int = opt(17, "of durations, noise and weights", "--seed")
    layers: int = opt(12, "layers of the transformer", "--layers")
    width: int = opt(768, "its width", "--width")
    repeats: int = opt(3, "rounds", "--repeats")
    checked: int = opt(20, "clips compared with transformers alone", "--checked")
    tokens_per_batch: int | None = opt(None, "as for extract.py", "--tokens-per-batch")
    num_workers: int = opt(0, "processes of ours that decode", "--num-workers")
    threads: int = opt(1, "threads of PyTorch", "--threads")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    write: bool = opt(True, "append to bench/RESULTS.md", "--write")


@dataclass
class Job:
    """What a process needs to know."""

    clips: list[Clip]
    weights: str
    out: str
    device: torch.device
    threads: int
    workers: int
    tokens: int | None


def durations(cfg: Config) -> np.ndarray:
    """Seconds of each clip."""
    generator = np.random.default_rng(cfg.seed)
    if cfg.meld is None:
        drawn = generator.lognormal(np.log(MEDIAN), SPREAD, cfg.clips)
        return drawn.clip(0.2, LONGEST)
    found = []
    for split in ("train", "dev", "test"):
        for _, row in csv_rows(Path(cfg.meld, f"{split}_sent_emo.csv"), ("StartTime",), "cp1252"):
            try:
                found.append(seconds(row["EndTime"]) - seconds(row["StartTime"]))
            except (KeyError, ValueError):
                raise UserError(f"{cfg.meld}: {split}_sent_emo.csv: no StartTime and EndTime in every line") from None
    return generator.choice([length for length in found if 0.2 <= length <= LONGEST], cfg.clips)


def seconds(text: str) -> float:
    """Of a time as in subtitles, 00:16:16,059."""
    hours, minutes, rest = text.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def make_clips(folder: Path, lengths: np.ndarray, seed: int) -> list[Clip]:
    """Noise whose level rises and falls."""
    generator, clips = np.random.default_rng(seed), []
    for i, length in enumerate(lengths):
        time_axis = np.arange(round(length * RATE)) / RATE
        level = 0.1 + 0.08 * np.sin(2 * np.pi * generator.uniform(1, 4) * time_axis)
        path = folder / f"clip{i:04}.wav"
        soundfile.write(path, level * generator.standard_normal(len(time_axis)), RATE)
        clips.append(Clip(path.stem, str(path)))
    return clips


def make_weights(folder: Path, cfg: Config) -> None:
    """A HuBERT-base in transformers' layout."""
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(cfg.seed)
    shape: dict[str, Any] = {"hidden_size": cfg.width, "num_hidden_layers": cfg.layers}
    shape |= {"num_attention_heads": cfg.width // 64, "intermediate_size": 4 * cfg.width}
    HubertModel(HubertConfig(**shape)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)


# --- the variants, each in a process of its own -----------------------------------------------------------------------

Load = Callable[[Job], Callable[[list[Clip]], None]]


def load_ours(job: Job) -> Callable[[list[Clip]], None]:
    encoder = encoders.load("hubert", job.weights)
    encoder.to(job.device)

    def work(clips: list[Clip]) -> None:
        here = dist.Ranks(device=job.device)
        quiet: list[str] = []
        extract(clips, encoder, "frames", job.out, here, workers=job.workers, tokens=job.tokens, say=quiet.append)

    return work


def load_theirs(job: Job, batch: int = BATCH) -> Callable[[list[Clip]], None]:
    from transformers import HubertModel, Wav2Vec2FeatureExtractor

    model = HubertModel.from_pretrained(job.weights).eval().to(job.device)  # pyright: ignore[reportArgumentType]
    prepare = Wav2Vec2FeatureExtractor.from_pretrained(job.weights)

    @torch.inference_mode()
    def work(clips: list[Clip]) -> None:
        Path(job.out).mkdir()
        for first in range(0, len(clips), batch):
            part = clips[first : first + batch]
            sounds = [soundfile.read(str(clip.path), dtype="float32")[0] for clip in part]
            given = prepare(sounds, sampling_rate=RATE, padding=True, return_tensors="pt").to(job.device)
            states = model(**given).last_hidden_state.cpu()
            for clip, state, sound in zip(part, states, sounds, strict=True):
                count = int(model._get_feat_extract_output_lengths(len(sound)))
                np.save(Path(job.out, f"{clip.id}.npy"), state[:count].numpy())

    return work


def measured(load: Load, job: Job) -> tuple[float, float]:
    """Seconds that the clips take, and MiB of memory at most, of the GPU where there is one."""
    import transformers.models.hubert.modeling_hubert  # noqa: F401

    torch.set_num_threads(job.threads)
    torch.nn.functional.gelu(torch.ones(1, device=job.device))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = memory("VmRSS")
    work = load(job)
    began = time.perf_counter()
    work(job.clips)
    taken = time.perf_counter() - began
    if job.device.type == "cuda":
        return taken, torch.cuda.max_memory_allocated(job.device) / 2**20
    return taken, memory("VmHWM") - before


# --- the report -------------------------------------------------------------------------------------------------------


def measure(cfg: Config, device: torch.device, lengths: np.ndarray) -> list[tuple[str, str]]:
    """Rows of the table."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "transformers": []}
    loads: dict[str, Load] = {"ours": load_ours, "transformers": load_theirs}
    with TemporaryDirectory() as name:
        root = Path(name)
        make_weights(root / "weights", cfg)
        clips = make_clips(root, lengths, cfg.seed)

        def job(out: str) -> Job:
            sizes = (device, cfg.threads, cfg.num_workers, cfg.tokens_per_batch)
            return Job(clips, str(root / "weights"), str(root / out), *sizes)

        for variant in turns(found, cfg.repeats, "features"):
            each = found[variant]
            each.append(apart(measured, loads[variant], job(f"{variant}{len(each)}")))
        some = clips[:: max(len(clips) // cfg.checked, 1)]
        load_theirs(job("alone"), 1)(some)
        store = FeatureStore(root / "ours0")
        gaps = [0.0, 0.0]
        for clip in some:
            alone = np.load(root / "alone" / f"{clip.id}.npy")
            for k, other in enumerate((store[clip.id].numpy(), np.load(root / "transformers0" / f"{clip.id}.npy"))):
                gaps[k] = max(gaps[k], float(np.abs(other - alone).max()))
    if gaps[0] > 1e-4:
        raise UserError(f"ours differs from transformers' states of a clip alone by {gaps[0]:.2g}")
    rows = []
    for variant, values in found.items():
        took, peak = zip(*values, strict=True)
        rows += [
            (f"{variant}: clips/s", spread([len(clips) / t for t in took])),
            (f"{variant}: seconds of sound/s", spread([lengths.sum() / t for t in took])),
            (f"{variant}: peak MiB", spread(list(peak))),
            (f"{variant}: largest difference from one clip at a time", f"{gaps[variant != 'ours']:.2g}"),
        ]
    both = list(zip(found["ours"], found["transformers"], strict=True))
    rows.append(("clips/s, times transformers'", spread([theirs[0] / ours[0] for ours, theirs in both])))
    rows.append(("peak, times transformers'", spread([ours[1] / theirs[1] for ours, theirs in both])))
    return rows


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    device = dist.ranks(cfg.device).device
    lengths = durations(cfg)
    source = "a log-normal distribution" if cfg.meld is None else "MELD's lists"
    what = (
        f"{cfg.clips} clips of {lengths.min():.1f} to {lengths.max():.1f} s, {lengths.sum() / 60:.1f} min, drawn "
        f"from {source} with seed {cfg.seed}; HuBERT of {cfg.layers} layers, {cfg.width} wide, fp32; {cfg.repeats} "
        "rounds; median (least to most)"
    )
    lines = header("bench/extract.py", device, cfg.threads, what)
    publish(lines + table("extraction", measure(cfg, device, lengths)), cfg.write)


if __name__ == "__main__":
    run(Config, main)
