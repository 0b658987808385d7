"""Score a checkpoint on a benchmark: table, metrics.json, predictions.jsonl and confusion.png.

$ python eval.py --ckpt out/llm_fast/checkpoints/best
$ python eval.py --ckpt out/ravdess --decode generate --fold 2
$ python eval.py --ckpt out/mosei --data-root datasets/mosei
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from common import checkpoint, config, dist, metrics
from common.config import UserError, opt
from common.log import confusion_png
from data.clips import ClipData, Features, load_test
from data.mosei import open_corpus
from data.prompts import LAYOUTS
from data.utterances import load_splits
from evals import emotion, sentiment
from evals.emotion import BENCHMARKS, DecodeConfig
from predict import FusionPredictor, LlmPredictor, load


@dataclass
class Config:
    ckpt: str = opt("", "a run folder (its best, else its last checkpoint) or one checkpoint", "--ckpt")
    bench: str | None = opt(
        None, "mer2023: six labels of a MERR list; clips: any manifest or list; mosei: sentiment; default: by the data",
        "--bench", choices=(*BENCHMARKS, "mosei"),
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
    if checkpoint.read_state(checkpoint.resolve(cfg.ckpt, prefer="best")).get("system") == "mosei":
        return score_fusion(cfg, here, say)
    if cfg.bench == "mosei":
        raise UserError("--bench mosei: this checkpoint is a language model's (benchmarks: mer2023, clips)")
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
    features = Features(predictor.mllm.cfg.rows(), predictor.mllm.cfg.visual, data_cfg)
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


def score_fusion(cfg: Config, here: dist.Ranks, say: Callable[[str], None]) -> None:
    """The report of train_mosei.py again, on the test split of its data or of another set's."""
    predictor = load(cfg.ckpt, str(here.device))
    assert isinstance(predictor, FusionPredictor)
    say(f"{predictor.folder}: {predictor.coverage}")
    if cfg.bench not in (None, "mosei"):
        raise UserError(f"--bench {cfg.bench}: this checkpoint scores sentiment (benchmark: mosei)")
    if not here.main:
        return
    made = checkpoint.read_state(predictor.folder)["config"]
    root = cfg.data_root or cfg.manifest or made["data_root"]
    splits = load_splits(open_corpus(root, say), made["stores"], made["valid_share"], made["split_seed"],
                         made["max_frames"], say)  # fmt: skip
    for data in splits.values():
        sentiment.standardize(data, predictor.model, cfg.streams)
    if not len(splits["test"]):
        raise UserError(f"{root}: no test utterances")
    splits = {name: data.to(here.device) for name, data in splits.items()}
    report, logits = sentiment.report(predictor.model, splits, made["label_scheme"], say)
    out = place(cfg, predictor.folder, "mosei")
    sentiment.write(out, report, logits, splits["test"])
    say(f"written to {out}")


if __name__ == "__main__":
    config.run(Config, main)
