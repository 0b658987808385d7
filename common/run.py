"""A run's folder: where it begins or goes on from, and taking it over."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from common import checkpoint, config
from common.config import UserError

T = TypeVar("T", bound=Any)


def resume_or_start(cfg: T, name: str, say: Callable[[str], None]) -> tuple[T, Path | None]:
    """The run's config, `out` filled in, and the checkpoint it goes on from, None for a fresh start.

    `name` names the run when neither --out nor --cfg does.
    """
    out = Path(cfg.out or f"out/{Path(config.source(cfg) or name).stem}")
    start = None
    if cfg.resume and cfg.resume != "last":
        if not Path(cfg.resume).exists():
            raise UserError(f"--resume {cfg.resume}: not found (first run: leave --resume out)")
        start = checkpoint.resolve(cfg.resume)
        out = Path(cfg.out) if config.flagged(cfg, "out") else start.parent.parent
    elif cfg.resume:
        start = checkpoint.newest(out / "checkpoints")
        if config.flagged(cfg, "ckpt"):
            if start is None:
                start = checkpoint.resolve(cfg.ckpt)
            else:
                say(f"--resume: {out} holds a run, which goes on; --ckpt {cfg.ckpt} is not read")
        if start is None:
            say(f"--resume: {out} holds no checkpoint yet, starting fresh")
    elif checkpoint.newest(out / "checkpoints") and not cfg.overwrite:
        raise UserError(
            f"{out} holds a run: --resume goes on with it, --overwrite replaces it, --out DIR starts elsewhere"
        )
    if start is not None:
        cfg, changes = config.resume(cfg, checkpoint.read_state(start)["config"])
        for change in changes:
            say(f"changed since the run began: {change}")
    cfg.out = str(out)
    return cfg, start


def fast_run(folder: str, made: bool) -> bool:
    """Whether another script's --fast run lies in `folder`, of data of the same kind: made up by it, or found."""
    best = Path(folder, "checkpoints", "best")
    if not best.exists():
        return False
    root = checkpoint.read_state(best)["config"]["data"]["data_root"]
    return (root == str(Path(folder, "mock"))) == made


def open_run(cfg: Any, out: Path, start: Path | None) -> checkpoint.RunLock:
    """Takes the run folder: locks it, clears what a killed save left, sets aside what is later than `start`."""
    lock = checkpoint.RunLock(out)
    if cfg.overwrite and start is None:
        for old in ("checkpoints", "tensorboard", "eval"):
            shutil.rmtree(out / old, ignore_errors=True)
        (out / "log.jsonl").unlink(missing_ok=True)
    root = out / "checkpoints"
    root.mkdir(exist_ok=True)
    checkpoint.clean(root)
    if start is not None and start.parent == root.resolve():
        checkpoint.rewind(root, checkpoint.read_state(start))
    (out / "config.yaml").write_text(yaml.safe_dump(config.to_dict(cfg), sort_keys=False))
    return lock
