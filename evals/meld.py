"""MELD opened for stage 4: its lists, and features that are there or that frozen encoders make once."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common import dist
from common.config import UserError, opt
from data.extraction import extract
from data.features import Store
from data.manifest import Clip
from data.meld import load_meld
from data.pairs import SPLITS, STREAMS, Pairs, PairsConfig, open_stores
from data.resident import Ragged
from evals import speech
from model import encoders
from model.clap import OWNER
from model.meld import Meld

TEXT_ONLY = {"text": {"encoder": "hashtext", "pooling": "ids", "options": {}}}  # where nothing else is asked for
PUBLISHED = {  # what the published classifiers of stage 3 read
    "audio": {"encoder": "auristream", "pooling": "mean", "options": {"original": "true"}},
    "text": {"encoder": "embeddinggemma", "pooling": "sentence", "options": {"prompt": "none"}},
}


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
    say: Callable[[str], None], default: dict[str, dict[str, Any]] = TEXT_ONLY,
) -> dict[str, Store]:  # fmt: skip
    """Feature stores: those at hand, else made once and kept, as `made` (modality -> how a store was made) says.

    `default` says it where neither the command nor `made` does. What is not in `made`, if anything is, stays unread.
    """
    root = Path(str(cfg.data_root))
    if not cfg.encoders and (cfg.stores or any((root / m / "index.json").is_file() for m in STREAMS)):
        found = open_stores(cfg.pairs())
        if made:
            found = {m: store for m, store in found.items() if m in made}
        for m in [m for m in found if m in made]:
            _same(m, found[m].info, made[m])
        if "audio" in found and "stats" in made and "stats" not in found:
            raise UserError(f"{root}: the model reads stats beside audio: --stores stats=FOLDER")
        if not found:
            raise UserError(f"{root}: its stores have nothing of what the model reads ({', '.join(made)})")
        return found
    found = {}
    for m, info in ({m: _parse(m, text) for m, text in cfg.encoders.items()} or made or default).items():
        encoder, pooling = _encoder(m, info)
        if m in made:
            _same(m, encoder.info(pooling), made[m])
        if OWNER[m] == "audio" and not any(clip.path for clip in clips):
            if m in cfg.encoders:
                raise UserError(f"--encoders {m}={encoder.name}: {cfg.data_root} holds no clips")
            say(f"{cfg.data_root} holds no clips: only words are read")
            continue
        copy = _fingerprint(cfg.data_root, encoder.info(pooling))
        folder = Path(cfg.features_root, f"{encoder.name}-{pooling}-{copy}")
        store = extract(clips, encoder, pooling, folder, here, workers=workers, say=say)
        if store is None:
            raise SystemExit(0)  # asked to stop; what is made is kept
        found[m] = store
    if not found:
        raise UserError(f"{cfg.data_root} holds no clips, and the model reads nothing else")
    return found


@torch.inference_mode()
def known(model: Meld, data: Pairs) -> speech.Views:
    """The views of a split; of a frozen backbone what the head reads of each, computed once."""
    views = speech.views(data)
    if not model.frozen:
        return views
    made: speech.Views = {}
    for way, (_, only) in views.items():
        rows = [speech.read(data, i[None], only, data.device) for i in torch.arange(len(data)).split(speech.BATCH)]
        values = torch.cat([model.features(*part)[0] for part in rows])
        values = torch.cat([values, torch.zeros_like(values[:1])])
        place = torch.arange(len(values), device=values.device)[:, None]
        made[way] = replace(data, parts={"features": Ragged(values, place)}), None
    return made


def _parse(modality: str, text: str) -> dict[str, Any]:
    if modality not in STREAMS:
        raise UserError(f"--encoders: '{modality}' is not one of {', '.join(STREAMS)}")
    name, _, pooling = text.partition(":")
    return {"encoder": name, "pooling": pooling or None, "options": {}}


def _encoder(modality: str, info: dict[str, Any]) -> tuple[Any, str]:
    """The encoder that makes features as `info` says, and its pooling."""
    name = info.get("encoder")
    if name not in encoders.ENCODERS:
        raise UserError(f"{modality}: '{name}' is no encoder here: --stores {modality}=FOLDER names MELD's features")
    encoder = encoders.load(name, **info.get("options", {}))
    pooling = info.get("pooling") or encoder.poolings[0]
    if pooling not in encoder.poolings:
        raise UserError(f"--encoders {modality}={name}:{pooling}: poolings are {', '.join(encoder.poolings)}")
    if encoder.modality != OWNER[modality]:
        raise UserError(f"--encoders {modality}={name}: {name} reads {encoder.modality}")
    return encoder, pooling


def _fingerprint(root: str | None, info: dict[str, Any]) -> str:
    """What tells features of this copy of MELD, made in this way, from others: all copies share their ids."""
    return hashlib.sha256(json.dumps([str(Path(str(root)).resolve()), info], sort_keys=True).encode()).hexdigest()[:8]


def _same(modality: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    """UserError unless two stores were made in the same way: a model must be given what it was trained on."""
    keys = ("encoder", "pooling", "options", "weights_sha256", "dim")
    wrong = next((key for key in keys if here.get(key) != there.get(key)), None)
    if wrong is not None:
        raise UserError(
            f"{modality}: features have {wrong} {here.get(wrong)}, the model was trained on {there.get(wrong)}"
        )
