"""Score a checkpoint on a benchmark: table, metrics.json, predictions.jsonl and confusion.png.

$ python eval.py --ckpt out/llm_fast/checkpoints/best
$ python eval.py --ckpt out/ravdess --decode generate --fold 2
$ python eval.py --ckpt out/mosei --data-root datasets/mosei
$ python eval.py --ckpt out/slm
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import checkpoint, config, dist, metrics
from common.config import UserError, from_dict, opt
from common.log import confusion_png
from data import pairs
from data.clips import ClipData, Features, load_test
from data.mosei import open_corpus
from data.prompts import LAYOUTS
from data.utterances import load_splits
from evals import emotion, retrieval, sentiment, speech
from evals.emotion import BENCHMARKS, DecodeConfig
from evals.meld import MeldSource, known, read_splits, stores
from model import clap, fusion, meld, slm
from model.mllm import load_visual
from predict import LlmPredictor, load


@dataclass
class Config:
    ckpt: str = opt("", "a run folder (its best, else its last checkpoint) or one checkpoint", "--ckpt")
    bench: str | None = opt(
        None, "mer2023: six labels of a MERR list; clips: any manifest or list; the others belong to one kind of "
        "checkpoint; default: by checkpoint and data",
        "--bench", choices=(*BENCHMARKS, "mosei", "clap", "slm", "meld"),
    )  # fmt: skip
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    out: str | None = opt(
        None, "folder for the results; default: eval/<benchmark>/<checkpoint> in the run folder", "--out"
    )
    limit: int = opt(0, "most clips; 0: all", "--limit")
    batch_size: int = opt(8, "clips decoded together", "--batch-size")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    seed: int = opt(42, "seed of sampling", "--seed")
    llm: str | None = opt(None, "other place of the frozen language model than in training", "--llm")
    data_root: str | None = opt(None, "other place of the data than in training", "--data-root")
    features_root: str | None = opt(None, "other place of the feature stores")
    manifest: str | None = opt(None, "another manifest", "--manifest")
    fold: str | None = opt(None, "another fold of the manifest", "--fold")
    test_file: str | None = opt(None, "another list of clips", "--test-file")
    streams: list[str] = opt([], "use only these streams (text, image, cls, feature names)", "--streams")
    prompt_layout: str | None = opt(None, "another prompt layout", choices=LAYOUTS)


def main(cfg: Config) -> None:
    if not cfg.ckpt:
        raise UserError("--ckpt is needed (a run folder or a checkpoint)")
    here = dist.ranks(cfg.device)
    say = print if here.main else lambda *_: None
    folder = checkpoint.resolve(cfg.ckpt, prefer="best")
    state = checkpoint.read_state(folder)
    system = state.get("system")
    if system in OTHERS:
        if cfg.bench not in (None, system):
            raise UserError(f"--bench {cfg.bench}: this checkpoint is of another kind (benchmark: {system})")
        for name in READ["llm"]:
            if name not in READ[system] and getattr(cfg, name):
                raise UserError(f"--{name.replace('_', '-')}: not read for a checkpoint of {system}")
        return OTHERS[system](cfg, folder, state, here, say) if here.main else None
    if cfg.bench in OTHERS:
        raise UserError(f"--bench {cfg.bench}: this checkpoint is a language model's (benchmarks: mer2023, clips)")
    predictor = load(cfg.ckpt, str(here.device), llm=cfg.llm)
    assert isinstance(predictor, LlmPredictor)
    say(f"{predictor.folder}: {predictor.coverage}")
    names = ("data_root", "features_root", "manifest", "fold", "test_file", "streams", "prompt_layout")
    data_cfg = replace(predictor.data, **{name: getattr(cfg, name) for name in names if getattr(cfg, name)})
    if cfg.test_file and not cfg.manifest:
        data_cfg.manifest = None  # this list, not the training run's manifest
    six = not data_cfg.manifest and set(BENCHMARKS["mer2023"]) <= set(data_cfg.labels)
    bench = cfg.bench or ("mer2023" if six else "clips")
    labels = BENCHMARKS[bench] or data_cfg.labels
    model_cfg = predictor.mllm.cfg
    features = Features(model_cfg.rows(), model_cfg.visual, data_cfg, load_visual(model_cfg, here.device))
    features.check_made(predictor.made)
    data = ClipData(load_test(data_cfg, say), features, data_cfg, predictor.tokenizer.encode)
    say(f"{len(data)} clips ({data.coverage()})")
    dist.connect(here)
    scores, records = emotion.evaluate(
        predictor.mllm, predictor.tokenizer, data, labels, cfg.decode, here, cfg.batch_size,
        seed=cfg.seed, limit=cfg.limit, progress=True,
    )  # fmt: skip
    if here.main:
        out = place(cfg, predictor.folder, bench)
        out.mkdir(parents=True, exist_ok=True)
        settings = {"bench": bench, "labels": labels, "checkpoint": str(cfg.ckpt), **config.to_dict(cfg.decode)}
        settings["speaker_norm"] = data_cfg.speaker_norm
        (out / "metrics.json").write_text(json.dumps(settings | scores, indent=1))
        with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        confusion_png(
            scores["confusion"], labels, out / "confusion.png", f"{bench}, {cfg.decode.decode}: {predictor.folder.name}"
        )
        say(metrics.table(scores, scores["majority"]))
        say(f"{cfg.decode.decode}: {metrics.line(scores)}; written to {out}")
    dist.cleanup()


def place(cfg: Config, folder: Path, bench: str) -> Path:
    """Where the results of a checkpoint go."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    return Path(cfg.out) if cfg.out else run / "eval" / bench / folder.name


def score_fusion(cfg: Config, folder: Path, state: dict[str, Any], here: dist.Ranks, say: Callable) -> None:
    """The report of train_mosei.py again, on the test split of its data or of another set's."""
    model, coverage = fusion.load(folder, state)
    say(f"{folder}: {coverage}")
    made = state["config"]
    root = cfg.data_root or cfg.manifest or made["data_root"]
    splits = load_splits(open_corpus(root, say), made["stores"], made["valid_share"], made["split_seed"],
                         made["max_frames"], say)  # fmt: skip
    for data in splits.values():
        sentiment.standardize(data, model, cfg.streams)
    if not len(splits["test"]):
        raise UserError(f"{root}: no test utterances")
    model.to(here.device)  # not before: it has standardised the data
    splits = {name: data.to(here.device) for name, data in splits.items()}
    report, logits = sentiment.report(model, splits, made["label_scheme"], say)
    out = place(cfg, folder, "mosei")
    sentiment.write(out, report, logits, splits["test"])
    say(f"written to {out}")


def score_clap(cfg: Config, folder: Path, state: dict[str, Any], here: dist.Ranks, say: Callable) -> None:
    """Retrieval among the test pairs of train_clap.py's data or of another set's."""
    model, coverage = clap.load(folder, state)
    say(f"{folder}: {coverage}")
    splits = pairs.reopen(state, moved(cfg), [], say)
    test = splits["test"]
    test.standardize(model.dense, model.standardize)
    found = retrieval.report(model.to(here.device), test.to(here.device), "test")
    out = place(cfg, folder, "clap")
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(found, indent=1))
    say(f"{retrieval.table(found)}\nwritten to {out}")


def score_slm(cfg: Config, folder: Path, state: dict[str, Any], here: dist.Ranks, say: Callable) -> None:
    """The report of train_slm.py again, on the test split of its data or of another set's."""
    model, coverage = slm.load(folder, state)
    say(f"{folder}: {coverage}")
    splits = pairs.reopen(state, moved(cfg), state["labels"], say)
    for part in splits.values():
        part.standardize(model.clap.dense, model.clap.standardize)
    model.to(here.device)
    splits = {name: part.to(here.device) for name, part in splits.items()}
    note = "sound standardised by all clips of its speaker" if state["config"]["data"]["speaker_norm"] else ""
    found, logits = speech.report(model, splits, state["labels"], len(state["seeds"]), "test", say, note)
    out = place(cfg, folder, "slm")
    speech.write(out, found, logits, splits["test"])
    say(f"written to {out}")


def score_meld(cfg: Config, folder: Path, state: dict[str, Any], here: dist.Ranks, say: Callable) -> None:
    """The report of meld_train.py again; what its encoders made of MELD is kept and used again."""
    model, coverage = meld.load(folder, state)
    say(f"{folder}: {coverage}")
    source = from_dict(MeldSource, state["config"]["data"])
    source.data_root = cfg.data_root or source.data_root
    source.features_root = cfg.features_root or source.features_root
    clips = read_splits(source, say)
    opened = stores(source, [clip for part in clips.values() for clip in part], state["features"], 4, here, say)
    if lacking := sorted(set(state["features"]) - set(opened)):
        raise UserError(f"{source.data_root}: no features of {lacking[0]}, which the checkpoint reads")
    context = state["config"]["model"]["context"]
    splits = {name: pairs.load(part, opened, state["labels"], source.pairs(), context) for name, part in clips.items()}
    for part in splits.values():
        part.standardize(model.fronts.dense, model.fronts.standardize)
    model.to(here.device)
    splits = {name: part.to(here.device) for name, part in splits.items()}
    found, logits = speech.report(
        model, splits, state["labels"], len(state["seeds"]), "test", say, given=known(model, splits["test"])
    )
    out = place(cfg, folder, "meld")
    speech.write(out, found, logits, splits["test"])
    say(f"written to {out}")


def moved(cfg: Config) -> dict[str, Any]:
    """What of the data's place the command changes."""
    return {name: getattr(cfg, name) for name in ("data_root", "manifest", "fold") if getattr(cfg, name)}


# options that say what to evaluate on, by kind of checkpoint
READ = {
    "llm": ("llm", "data_root", "features_root", "manifest", "fold", "test_file", "streams", "prompt_layout", "limit"),
    "mosei": ("data_root", "manifest", "streams"),
    "clap": ("data_root", "manifest", "fold"),
    "slm": ("data_root", "manifest", "fold"),
    "meld": ("data_root", "features_root"),
}
OTHERS: dict[str | None, Callable] = {"mosei": score_fusion, "clap": score_clap, "slm": score_slm, "meld": score_meld}


if __name__ == "__main__":
    config.run(Config, main)
