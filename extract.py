"""Features from raw media with a frozen encoder: a store that every training script reads, resumable.

$ python extract.py --encoder logmel --manifest clips.csv --out features/logmel
$ python extract.py --encoder hubert --weights facebook/hubert-base-ls960 --manifest clips.csv --out features/hubert
$ torchrun --nproc-per-node 2 extract.py --encoder framestats --data-root datasets/MERR --out features/framestats
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import config, dist
from common.config import UserError, opt
from data.extraction import clear, extract
from data.features import shard_files, write_npy
from data.manifest import Clip, read_manifest
from data.merr import load_merr
from model import encoders


@dataclass
class Config:
    encoder: str = opt("logmel", "which encoder reads the clips", choices=tuple(encoders.ENCODERS))
    weights: str | None = opt(None, "folder or hub name of the encoder's weights; default: where they are published")
    options: dict[str, str] = opt({}, "options of the encoder, a=1,b=2")
    pooling: str | None = opt(None, "what is kept of a clip; default: the encoder's first")
    manifest: str | None = opt(None, "CSV or JSONL list of clips")
    data_root: str | None = opt(None, "folder in the layout of MERR, in place of a manifest")
    annotation_file: str = opt("MERR_coarse_grained.txt", "list of clips below data-root")
    image_path: str | None = opt(None, "folder of the videos; default: data-root/video")
    out: str | None = opt(None, "folder of the store; default: features/<encoder>")
    frame: str = opt("middle", "the frame that stands for a clip where one does", choices=("first", "middle", "peak"))
    image_size: int | None = opt(None, "side in pixels that a frame is resized to; default: the encoder's")
    device: str = opt("auto", "cpu, cuda, cuda:N or auto; encoders that read clip by clip run on the CPU")
    tokens_per_batch: int | None = opt(None, "rows that are encoded at once; default: 1,024 on a CPU, 16,384 on a GPU")
    num_workers: int = opt(2, "processes that decode; 0: none beside the main one")
    npy: str | None = opt(None, "folder for one <id>.npy a clip beside the store, the layout of MER2023")
    max_bad: float = opt(0.01, "largest share of clips that may fail")
    resume: bool = opt(False, "continue the extraction in --out")
    overwrite: bool = opt(False, "delete the store in --out first")


def main(cfg: Config) -> None:
    options: dict[str, Any] = cfg.options | ({} if cfg.image_size is None else {"image_size": cfg.image_size})
    encoder = encoders.load(cfg.encoder, cfg.weights, **options)
    pooling = encoder.poolings[0] if cfg.pooling is None else cfg.pooling
    if pooling not in encoder.poolings:
        raise UserError(f"--pooling: '{pooling}' is not one of {', '.join(encoder.poolings)} ({cfg.encoder})")
    out = Path(cfg.out or Path("features", cfg.encoder))
    there = shard_files(out) or (out / "index.json").exists()
    if there and not (cfg.resume or cfg.overwrite):
        raise UserError(f"{out} holds a store: --resume goes on with it, --overwrite replaces it, --out DIR is another")
    if cfg.tokens_per_batch is not None and cfg.tokens_per_batch < 1:
        raise UserError(f"--tokens-per-batch: {cfg.tokens_per_batch} is not above 0")
    here = dist.ranks(cfg.device if encoder.batched else "cpu")
    if here.main and encoder.coverage is not None:
        print(f"{cfg.encoder}: {encoder.coverage}")
    clips = read_clips(cfg, here.main)

    dist.connect(here)
    if cfg.overwrite and here.main:
        clear(out)
    dist.barrier()
    store = extract(
        clips, encoder, pooling, out, here, frame=cfg.frame, workers=cfg.num_workers, tokens=cfg.tokens_per_batch,
        max_bad=cfg.max_bad,
    )  # fmt: skip
    if here.main:
        if store is None:
            print(f"stopped; the same command with --resume continues {out}")
        elif cfg.npy is not None:
            write_npy(store, cfg.npy)
            print(f"{cfg.npy}: {len(store):,} files")
    dist.cleanup()


def read_clips(cfg: Config, talk: bool) -> list[Clip]:
    """The clips of the manifest or of the MERR list."""
    if cfg.manifest is not None and cfg.data_root is None:
        return read_manifest(cfg.manifest)
    if cfg.data_root is None or cfg.manifest is not None:
        raise UserError("give one of --manifest FILE and --data-root DIR")
    clips, listing = load_merr(cfg.data_root, cfg.annotation_file, cfg.image_path)
    if talk:
        print(listing)
    return clips


if __name__ == "__main__":
    config.run(Config, main)
