"""Score a checkpoint on a benchmark: table, metrics.json, predictions.jsonl and confusion.png.

$ python eval.py --ckpt out/llm_fast/checkpoints/best
$ python eval.py --ckpt out/ravdess --decode generate --fold 2
$ python eval.py --ckpt out/stage2/checkpoints/epoch_025 out/stage2/checkpoints/epoch_030 --combine weights
$ python eval.py --ckpt out/mosei --data-root datasets/mosei
$ python eval.py --ckpt out/slm
$ python eval.py --ckpt out/stage2 --bench emer --judge api --judge-url https://host/v1 --judge-model NAME
$ python eval.py --bench emer --answers answers.csv --truth gt-eng.csv
$ python eval.py --compare out/a out/b/checkpoints/epoch_010 out/text_only --out report.html
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import checkpoint, config, dist, metrics
from common.config import UserError, from_dict, opt
from common.log import confusion_png
from data import pairs
from data.clips import ClipData, DataConfig, Features, load_test
from data.dfew import FOLDS, load_dfew
from data.mesc import Turn, read_turns
from data.mosei import open_corpus
from data.prompts import ASKED, EMOTIONS9, LAYOUTS
from data.streams import clip_folder
from data.support import LAYOUTS as PROMPTS
from data.support import MODALITIES
from data.turns import load_turns, test_file
from data.utterances import load_splits
from evals import compare, emer, emotion, page, retrieval, sentiment, speech, support, texts
from evals.emotion import BENCHMARKS, DecodeConfig
from evals.freeform import FreeForm, find_truth, write
from evals.judge import JudgeConfig
from evals.meld import MeldSource, known, read_splits, stores
from evals.turns import linear, linear_table, turn_data
from model import clap, fusion, meld, slm
from model.combine import WAYS
from model.mllm import load_visual
from model.published import PublishedConfig
from predict import LlmPredictor, TurnPredictor, is_published, load, resolve


@dataclass
class Config:
    ckpt: list[str] = opt(
        [], "a run folder (its best, else its last checkpoint), one checkpoint or a published .pth", "--ckpt"
    )
    combine: str | None = opt(
        None, "several --ckpt as one: the mean of their weights, or of their predictions", "--combine", choices=WAYS
    )
    bench: str | None = opt(
        None, "; ".join(f"{name}: {bench.about}" for name, bench in BENCHMARKS.items()) + "; the others belong to one "
        "kind of checkpoint; default: by checkpoint and data",
        "--bench", choices=(*BENCHMARKS, "support", "mosei", "clap", "slm", "meld"),
    )  # fmt: skip
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    answers: str | None = opt(
        None, "emer, mer-ov: score these instead of a checkpoint's (predictions.jsonl, or a CSV names,chi_reasons)",
        "--answers",
    )  # fmt: skip
    truth: str | None = opt(
        None, "emer: true descriptions, CSV or caption JSON; mer-ov: CSV name,openset; default: the clips' own",
        "--truth",
    )  # fmt: skip
    synonyms: str | None = opt(None, "own groups of emotion words, one a line, commas between words", "--synonyms")
    text_metrics: list[str] = opt(
        [], "also compare answers with their references by these; they need requirements-extra.txt", "--text-metrics",
        choices=tuple(texts.PACKAGES),
    )  # fmt: skip
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
    feature_folders: dict[str, str] = opt(
        {}, "folders of feature streams that are not called as the model calls the stream", "--feature-folders"
    )
    fold: str | None = opt(None, "another fold of the manifest; dfew: one of its five", "--fold")
    test_file: str | None = opt(None, "another list of clips", "--test-file")
    streams: list[str] = opt([], "use only these streams (text, image, cls, feature names)", "--streams")
    prompt_layout: str | None = opt(None, "another prompt layout", choices=dict.fromkeys((*LAYOUTS, *PROMPTS)))
    image_path: str | None = opt(None, "dialogues: other folder of the clips than in training", "--image-path")
    modalities: list[str] = opt(
        [], "dialogues: give the model only these", "--modalities", choices=MODALITIES
    )  # fmt: skip
    num_workers: int = opt(4, "dialogues: threads that read clips", "--num-workers")
    question: str | None = opt(None, "another emotion question than in training", choices=ASKED)
    compare: list[str] = opt(
        [], "write one HTML page about these, evaluations or runs or checkpoints, to --out (report.html)", "--compare"
    )
    published: bool = opt(False, "--compare: published results beside them", "--published")
    model: PublishedConfig = field(default_factory=PublishedConfig)  # read for a published .pth only


def main(cfg: Config) -> None:
    here = dist.ranks(cfg.device)
    say = print if here.main else lambda *_: None
    if cfg.compare or cfg.published:
        return side_by_side(cfg, say) if here.main else None
    if cfg.answers:
        return score_answers(cfg, here, say) if here.main else None
    if not cfg.ckpt:
        raise UserError("--ckpt is needed (a run folder or a checkpoint)")
    folder = resolve(cfg.ckpt, cfg.combine)[0]
    state: dict[str, Any] = {} if is_published(folder) else checkpoint.read_state(folder)
    system = state.get("system") or "llm"
    if system == "llm" and cfg.bench in OTHERS:
        raise UserError(
            f"--bench {cfg.bench}: this checkpoint is a language model's (benchmarks: {', '.join(BENCHMARKS)})"
        )
    if system == "llm":
        predictor = load(cfg.ckpt, str(here.device), cfg.decode, cfg.llm, cfg.combine, cfg.model)
        say(f"{predictor.folder}: {predictor.coverage}")
        if isinstance(predictor, TurnPredictor):
            return score_turns(cfg, predictor, here, say)
        assert isinstance(predictor, LlmPredictor)
        return score_llm(cfg, predictor, here, say)
    if cfg.bench not in (None, system):
        raise UserError(f"--bench {cfg.bench}: this checkpoint is of another kind (benchmark: {system})")
    config.only(cfg, {*COMMON, *READ[system]}, f"the benchmark {system}")
    return OTHERS[system](cfg, folder, state, here, say) if here.main else None


# ---- the multimodal language model


def score_llm(cfg: Config, predictor: LlmPredictor, here: dist.Ranks, say: Callable) -> None:
    """A language model on one of the benchmarks of evals/emotion.py; the ranks share the clips."""
    name, data_cfg = choose(cfg, predictor.data)
    bench = BENCHMARKS[name]
    read = {*COMMON, *READ["llm"], *(FREE if bench.task != "emotion" else ())}
    config.only(cfg, read - {"manifest", "test_file"} if name == "dfew" else read, f"the benchmark {name}")
    labels = list(bench.labels) or data_cfg.labels
    decode = cfg.decode if bench.task == "emotion" else replace(cfg.decode, decode="generate")
    free = None
    if bench.task != "emotion":
        published = None if data_cfg.manifest or cfg.test_file else find_truth(name, data_cfg.data_root)
        free = free_form(cfg, name, cfg.truth or published, here)
    if cfg.text_metrics and decode.decode == "score":
        raise UserError("--text-metrics: scored labels are no text (--decode generate)")
    texts.check(cfg.text_metrics)

    # ---- clips and their features
    if name == "dfew":
        folds = {fold: load_dfew(data_cfg.data_root, fold, image_path=data_cfg.image_path)[0] for fold in wanted(cfg)}
    else:
        folds = {0: load_test(data_cfg, say)}
    model_cfg = predictor.mllm.cfg
    visual = load_visual(model_cfg, here.device)
    features = Features(model_cfg.rows(), model_cfg.visual, data_cfg, visual,
                        places(cfg, name, model_cfg.rows(), data_cfg))  # fmt: skip
    features.check_made(predictor.made)
    sets = {n: ClipData(clips, features, data_cfg, predictor.tokenizer.encode) for n, clips in folds.items()}
    for n, data in sets.items():
        say(f"{f'fold {n}: ' if n else ''}{len(data)} clips ({data.coverage()})")
    dist.connect(here)

    # ---- answers and their scores
    settings = {"bench": name, "labels": labels, "checkpoint": " ".join(cfg.ckpt), **config.to_dict(decode)}
    settings |= {"combine": cfg.combine} if cfg.combine else {}
    settings["speaker_norm"] = data_cfg.speaker_norm
    out = place(cfg, predictor.folder, name, predictor.name)
    model = predictor.mllm, predictor.tokenizer
    if free is not None:
        [data] = sets.values()
        chosen = free.chosen(data.clips, cfg.limit)
        records = emotion.ask(*model, data, chosen, labels, decode, here, cfg.batch_size, bench.task, cfg.seed, True)
        if here.main:
            free.finish(out, settings, records, {clip.id: clip.text for clip in data.clips}, say)
        return dist.cleanup()
    found = {
        n: emotion.evaluate(*model, data, labels, decode, here, cfg.batch_size,
                            seed=cfg.seed, limit=cfg.limit, progress=True, counts=predictor.counts.get("emotion"))
        for n, data in sets.items()
    }  # fmt: skip
    if here.main:
        scores, records = found[0] if 0 in found else emotion.over_folds(found, labels, decode.extract)
        if decode.decode == "generate":
            said = {clip.id: clip.text for data in sets.values() for clip in data.clips}
            scores["texts"] = texts.figures(records, said)
        if cfg.text_metrics:
            scores["texts"]["metrics"] = texts.compare(records, cfg.text_metrics)
        write(out, settings | scores, records)
        title = f"{name}, {decode.decode}: {predictor.name}"
        confusion_png(scores["confusion"], labels, out / "confusion.png", title)
        say(metrics.table(scores, scores["majority"]))
        if "folds" in scores:
            say(emotion.fold_table(scores))
        if "texts" in scores:
            say(texts.line(scores["texts"]))
        way = f", {cfg.combine} of {len(cfg.ckpt)} checkpoints" if cfg.combine else ""
        say(f"{decode.decode}{way}: {metrics.line(scores)}; written to {out}")
    dist.cleanup()


def score_turns(cfg: Config, predictor: TurnPredictor, here: dist.Ranks, say: Callable) -> None:
    """Dialogues: the four fields of an answer to each test turn, beside the commonest labels and a linear baseline."""
    if cfg.bench not in (None, "support"):
        raise UserError(f"--bench {cfg.bench}: this checkpoint answers turns of dialogues (benchmark: support)")
    config.only(cfg, {*COMMON, *READ["support"]}, "the benchmark support")
    texts.check(cfg.text_metrics)
    data = replace(predictor.data, data_root=cfg.data_root or predictor.data.data_root)
    data.test_file = cfg.test_file or predictor.data.test_file
    turns, listing = read_turns(test_file(data), data.max_bad)
    say(str(listing))
    streams = predictor.streams
    if streams.encoders:
        streams.folder = clip_folder(test_file(data), cfg.image_path or data.image_path)
        streams.check_made(predictor.made)
    streams.scan(turns, data.max_bad, say)
    prompt = predictor.support.prompt
    prompt.modalities = cfg.modalities or prompt.modalities
    prompt.layout = cfg.prompt_layout or prompt.layout
    if prompt.layout not in PROMPTS:
        raise UserError(f"--prompt-layout {prompt.layout}: dialogues have {', '.join(PROMPTS)}")
    chosen = turn_data(turns, streams, predictor.support, predictor.mllm.cfg, predictor.tokenizer)
    say(f"{len(chosen)} turns ({chosen.coverage()}), given {', '.join(prompt.modalities)}")
    dist.connect(here)
    records = support.ask(
        predictor.mllm, predictor.tokenizer, chosen, cfg.decode, here, cfg.batch_size, cfg.seed, cfg.limit,
        workers=cfg.num_workers, progress=True, counts=predictor.counts,
    )  # fmt: skip
    if here.main:
        scores = support.evaluate(records, prompt.emotions, prompt.strategies, cfg.text_metrics)
        settings = {"bench": "support", "checkpoint": " ".join(cfg.ckpt), "modalities": prompt.modalities}
        out = place(cfg, predictor.folder, "support", predictor.name)
        write(out, settings | config.to_dict(cfg.decode) | scores, records)
        for name, field in scores["fields"].items():
            if field["rows"]:
                confusion_png(field["confusion"], field["labels"], out / f"{name}.png", f"{name}: {predictor.name}")
        say(f"{support.table(scores)}\n{beside(predictor, data, turns)}\nwritten to {out}")
    dist.cleanup()


def beside(predictor: TurnPredictor, data: DataConfig, test: list[Turn]) -> str:
    """The linear baseline, where the turns that it learns from are here."""
    compressed = predictor.mllm.cfg.towers.mamba_compressor is not None
    try:
        splits = load_turns(replace(data, shuffle_labels=False), predictor.seed, True, False, lambda _: None)
        return linear_table(linear(splits | {"test": test}, predictor.support.prompt, compressed))
    except UserError as error:
        return f"no linear baseline: {error}"


def choose(cfg: Config, trained: DataConfig) -> tuple[str, DataConfig]:
    """The benchmark's name, and where its clips come from: the command, else the benchmark, else the training run."""
    names = ("data_root", "features_root", "manifest", "fold", "test_file", "streams", "prompt_layout", "question")
    data_cfg = replace(trained, **{name: getattr(cfg, name) for name in names if getattr(cfg, name)})
    if cfg.test_file and not cfg.manifest:
        data_cfg.manifest = None  # this list, not the training run's manifest
    six = not data_cfg.manifest and set(BENCHMARKS["mer2023"].labels) <= set(data_cfg.labels)
    name = cfg.bench or ("mer2023" if six else "clips")
    bench = BENCHMARKS[name]
    if bench.file and not cfg.test_file and not data_cfg.manifest:
        data_cfg.test_file = bench.file
    if bench.asked:
        data_cfg.labels = list(bench.asked)
    if bench.task != "emotion":  # the labels of its list, and those looked for in answers
        data_cfg.labels = list(dict.fromkeys([*trained.labels, *EMOTIONS9]))
    return name, data_cfg


def wanted(cfg: Config) -> list[int]:
    """The folds of DFEW that the command asks for."""
    if cfg.fold and cfg.fold not in map(str, FOLDS):
        raise UserError(f"--fold {cfg.fold}: dfew has the folds {', '.join(map(str, FOLDS))}")
    return [int(cfg.fold)] if cfg.fold else list(FOLDS)


def places(cfg: Config, name: str, streams: Mapping[str, Any], data_cfg: DataConfig) -> dict[str, str]:
    """The folders of feature streams that have another name: the benchmark's where they exist, and the command's."""
    if unknown := sorted(set(cfg.feature_folders) - set(streams)):
        raise UserError(f"--feature-folders {unknown[0]}: the model reads {', '.join(streams)}")
    roots = (data_cfg.data_root, data_cfg.features_root)
    found = {stream: folder for stream, folder in BENCHMARKS[name].folders.items()
             if any(Path(root, folder).is_dir() for root in roots)}  # fmt: skip
    return found | cfg.feature_folders


def free_form(cfg: Config, name: str, truth: str | Path | None, here: dist.Ranks) -> FreeForm:
    return FreeForm(name, cfg.judge, truth, cfg.synonyms, cfg.text_metrics, cfg.seed, here.device)


def score_answers(cfg: Config, here: dist.Ranks, say: Callable) -> None:
    """Answers that some model gave before, on emer or mer-ov."""
    free = [name for name, bench in BENCHMARKS.items() if bench.task != "emotion"]
    if cfg.bench not in free or cfg.ckpt:
        raise UserError(f"--answers needs --bench {' or '.join(free)}, and no --ckpt")
    config.only(cfg, {*COMMON, *FREE, "answers", "text_metrics", "limit", "seed"}, "--answers")
    assert cfg.answers is not None
    scorer = free_form(cfg, cfg.bench, cfg.truth, here)
    records = emer.read_answers(cfg.answers, (*emer.DESCRIPTIONS, *emer.WORDS))
    records = records[: cfg.limit] if cfg.limit else records
    say(f"{cfg.answers}: {len(records)} answers")
    out = Path(cfg.out) if cfg.out else Path(cfg.answers).parent / f"{cfg.bench}_{cfg.judge.kind}"
    settings = {"bench": cfg.bench, "answers_file": cfg.answers, "truth": cfg.truth}
    scorer.finish(out, settings, records, {}, say)


def side_by_side(cfg: Config, say: Callable) -> None:
    """The page that compares evaluations; nothing is evaluated."""
    for name in ("ckpt", "answers"):
        if getattr(cfg, name):
            raise UserError(f"--compare and --{name}: give one of them")
    if not cfg.compare:
        raise UserError("--published needs --compare")
    config.only(cfg, {"compare", "published", "bench", "out", "device", "seed"}, "--compare")
    found = compare.align(compare.read(compare.find(cfg.compare, cfg.bench)))
    say(f"written to {page.write(Path(cfg.out or 'report.html'), found, cfg.published, cfg.seed)}")


def place(cfg: Config, folder: Path, bench: str, name: str | None = None) -> Path:
    """Where the results of a checkpoint go, or of several under a name of their own."""
    return Path(cfg.out) if cfg.out else checkpoint.run_of(folder) / "eval" / bench / (name or folder.name)


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


# options that are read, by kind of checkpoint, and by the benchmarks of free answers
COMMON = ("ckpt", "combine", "bench", "out", "device", "batch_size", "num_workers")
FREE = ("truth", "synonyms", "judge")
READ = {
    "llm": (
        "llm", "data_root", "features_root", "manifest", "fold", "test_file", "streams", "prompt_layout", "question",
        "feature_folders", "limit", "seed", "text_metrics", "decode", "model",
    ),
    "support": (
        "llm", "data_root", "test_file", "prompt_layout", "image_path", "modalities", "limit", "seed", "text_metrics",
        "decode",
    ),
    "mosei": ("data_root", "manifest", "streams"),
    "clap": ("data_root", "manifest", "fold"),
    "slm": ("data_root", "manifest", "fold"),
    "meld": ("data_root", "features_root"),
}  # fmt: skip
OTHERS: dict[str | None, Callable] = {"mosei": score_fusion, "clap": score_clap, "slm": score_slm, "meld": score_meld}


if __name__ == "__main__":
    config.run(Config, main)
