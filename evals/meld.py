"""MELD opened for stage 4: its lists, and features that are there or that frozen encoders make once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import dist
from common.config import UserError, opt
from data.extraction import extract
from data.features import Store
from data.manifest import Clip
from data.meld import load_meld
from data.pairs import MODALITIES, SPLITS, PairsConfig, open_stores
from model import encoders

TEXT_ONLY = {"text": {"encoder": "hashtext", "pooling": "ids", "options": {}}}  # where nothing else is asked for


@dataclass
class MeldSource:
    data_root: str | None = opt(None, "folder of MELD: its CSV files, and its clips if there are any", "--data-root")
    stores: dict[str, str] = opt({}, "audio or text=feature store; default: audio/ and text/ in data-root", "--stores")
    encoders: dict[str, str] = opt(
        {}, "audio or text=encoder or encoder:pooling that reads MELD; default: those of the stage-3 checkpoint, else "
        "text=hashtext", "--encoders",
    )  # fmt: skip
    features_root: str = opt("features/meld", "where what encoders made is kept")
    max_frames: int = opt(1000, "frames or ids of a clip; what is longer is cut", "--max-frames")
    limit: int = opt(0, "most utterances of a split; 0: all", "--limit")

    def pairs(self) -> PairsConfig:
        return PairsConfig(data_root=self.data_root, stores=self.stores, max_frames=self.max_frames)


def read_splits(cfg: MeldSource, say: Callable[[str], None]) -> dict[str, list[Clip]]:
    """The utterances of train, valid and test."""
    clips = load_meld(str(cfg.data_root), say)
    splits = {split: [clip for clip in clips if clip.split == split] for split in SPLITS}
    return {split: part[: cfg.limit] if cfg.limit else part for split, part in splits.items()}


def stores(
    cfg: MeldSource, clips: list[Clip], made: dict[str, dict[str, Any]], workers: int, here: dist.Ranks,
    say: Callable[[str], None],
) -> dict[str, Store]:  # fmt: skip
    """Feature stores: those at hand, else made as `made` says (modality -> how a store was made), once, and kept."""
    found: dict[str, Store] = {}
    root = Path(str(cfg.data_root))
    given = bool(cfg.stores) or any((root / m / "index.json").is_file() for m in MODALITIES)
    if given and not cfg.encoders:
        found = open_stores(cfg.pairs())
        for m in made.keys() & found.keys():
            _same(m, found[m].info, made[m])
        return found
    wanted = {m: _parse(m, text) for m, text in cfg.encoders.items()} or made or TEXT_ONLY
    for m, info in wanted.items():
        name = info.get("encoder")
        if name not in encoders.ENCODERS:
            raise UserError(f"{m}: features of '{name}' were made elsewhere: --stores {m}=FOLDER names MELD's")
        encoder = encoders.load(name, **info.get("options", {}))
        pooling = info.get("pooling") or encoder.poolings[0]
        if pooling not in encoder.poolings:
            raise UserError(f"--encoders {m}={name}:{pooling}: poolings are {', '.join(encoder.poolings)}")
        if encoder.modality != m:
            raise UserError(f"--encoders {m}={name}: {name} reads {encoder.modality}")
        if m in made:
            _same(m, encoder.info(pooling), made[m])
        if m == "audio" and not any(clip.path for clip in clips):
            if m in cfg.encoders:
                raise UserError(f"--encoders {m}={name}: {cfg.data_root} holds no clips")
            say(f"{cfg.data_root} holds no clips: only words are read")
            continue
        folder = Path(cfg.features_root, f"{name}-{pooling}")
        store = extract(clips, encoder, pooling, folder, here, workers=workers, say=say)
        if store is None:
            raise SystemExit(0)  # asked to stop; what is made is kept
        found[m] = store
    return found


def _parse(modality: str, text: str) -> dict[str, Any]:
    if modality not in MODALITIES:
        raise UserError(f"--encoders: '{modality}' is not one of {', '.join(MODALITIES)}")
    name, _, pooling = text.partition(":")
    return {"encoder": name, "pooling": pooling or None, "options": {}}


def _same(modality: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    """UserError unless two stores were made in the same way: a model must be given what it was trained on."""
    keys = ("encoder", "pooling", "options", "weights_sha256", "dim")
    wrong = next((key for key in keys if here.get(key) != there.get(key)), None)
    if wrong is not None:
        raise UserError(
            f"{modality}: features have {wrong} {here.get(wrong)}, stage 3 was trained on {there.get(wrong)}"
        )
