"""MultiMood's side of train_llm.py: turns of therapists that it trains on, and how they score a checkpoint."""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from common import config, dist
from common.config import UserError
from common.log import Logger, confusion_image, table_lines
from data.chat import START, llama2
from data.clips import DataConfig, check_probabilities
from data.mesc import Turn, Utterance, memory_text, read_turns
from data.mock_support import make_support
from data.prompts import Encode
from data.streams import TurnStreams, clip_folder
from data.support import CHATML, Chat, PromptConfig, TurnSample, format_target, segments
from data.turns import AUGMENTATIONS, CLOSED, SupportConfig, TurnData, load_turns
from evals import emotion, sizes, support, tfidf
from model.mllm import Mllm, MllmConfig, Standardised
from model.stc import Unsuitable, load_projectors
from model.tokenizer import Tokenizer, load_tokenizer
from model.towers import TowerConfig, load_towers
from model.toy import make_toy_mamba, make_toy_qwen2

STATISTICS = 256  # turns whose rows tell mean and deviation
FAST_TURNS = (800, 60, 120)  # train, validation and test
# --fast: everything is made on the spot (data/mock_support.py, model/toy.py), nothing is downloaded
FAST = {
    "model.full": True, "model.normalize": True, "model.grad_checkpoint": False, "model.max_len": 900,
    "model.towers.vision_tower": "framestats", "model.towers.num_frames": 4, "model.towers.patches": 36,
    "model.towers.vision_width": 12, "model.towers.audio_tower": "logmel", "model.towers.mm_projector_a_type": "linear",
    "model.towers.audio_tokens": 1, "model.towers.audio_width": 504, "model.towers.audio_seconds": 8.0,
    "support.answer_room": 64, "support.prompt.k_turn_history": 0, "support.prompt.context": False,
    "support.prompt.emotions": ["anger", "sadness", "joy", "fear", "neutral"],
    "support.prompt.strategies": ["restatement", "self-disclosure", "approval", "open question"],
    "optim.lr": 1.5e-3, "optim.mm_projector_lr": 2e-3, "optim.min_lr": 1e-4, "optim.warmup_lr": 1e-4,
    "optim.warmup_steps": 40, "optim.beta2": 0.95, "epochs": 4,
    "precision": "fp32", "num_workers": 2, "log_every": 20, "evaluate": True, "eval_every": 4, "save_every": 4,
    "save_best": True, "test": True, "decode.max_new_tokens": 16, "eval_batch_size": 32,
}  # fmt: skip
STAND_IN = Turn(
    "stand_in", "stand_in", None, "work", "The client has lost her job.", "And then he told me that it was over.",
    "What did you feel when he said that?", "sadness", "neutral", "open question", ["clip.mp4"],
    [
        Utterance("client", "neutral", "I was at work on Monday, as always."),
        Utterance("therapist", "neutral", "What happened there?"),
    ],
)  # fmt: skip
# what the streams, lists and questions of Emotion-LLaMA's clips alone are for
UNREAD = (
    *(f"data.{name}" for name in (
        "annotation_file", "manifest", "fold", "features_root", "task_pool", "labels", "question", "prompt_layout",
        "chat_template", "frame", "streams", "curriculum", "curriculum_epochs", "curriculum_share", "replay",
        "replay_ratio", "replay_tasks", "speaker_norm", "speaker_swap",
    )),
    *(f"model.{name}" for name in (
        "feature_tokens", "visual_encoder", "visual_weights", "visual_options", "visual_width", "image_size", "merge",
    )),
)  # fmt: skip
MEANS = ("accuracy", "weighted_f1", "macro_f1")  # over the fields of closed choice


def prepare_fast(cfg: Any) -> Any:
    """Makes dialogues, clips, tokenizer, language model and compressor in the run folder; the config that uses them."""
    out = Path(cfg.out or f"out/{Path(config.source(cfg) or 'multimood_fast').stem}")
    mock = out / "mock"
    cfg = config.preset(cfg, FAST | {
        "out": str(out), "model.llm": str(out / "base"), "model.towers.mamba_compressor": str(out / "mamba"),
        "data.data_root": str(mock / "train.jsonl"), "data.valid_file": str(mock / "val.jsonl"),
        "data.test_file": str(mock / "test.jsonl"), "batch_size": max(1, 8 // int(os.environ.get("WORLD_SIZE", 1))),
    })  # fmt: skip
    cfg.data.data_root, cfg.data.valid_file = str(mock / "train.jsonl"), str(mock / "val.jsonl")
    if (out / "mamba" / "config.json").exists() and cfg.resume:
        return cfg
    shutil.rmtree(out, ignore_errors=True)
    print(f"--fast: making {sum(FAST_TURNS)} dialogues with drawn and spoken clips below {mock}")
    make_support(mock, *FAST_TURNS, seed=cfg.seed, workers=2)
    prompt = cfg.support.prompt
    written = []
    for turn in read_turns(mock / "train.jsonl")[0]:
        written += [piece for piece in segments(turn, prompt, ("video", "audio", "history")) if isinstance(piece, str)]
        written += [format_target(turn, prompt.fields), memory_text(turn)]
    make_toy_qwen2(out / "base", written, seed=cfg.seed, heads=2)  # fewer are quicker on a CPU
    make_toy_mamba(out / "mamba", load_tokenizer(out / "base").vocab_size + 1, seed=cfg.seed)
    return cfg


class TurnTask:
    """A file of turns: what train_llm.py trains on, chooses by and reads at the end."""

    METRICS, LOWER = (*MEANS, *CLOSED, "loss"), ("loss",)
    prepare_fast = staticmethod(prepare_fast)
    turns: dict[str, list[Turn]]  # by split
    streams: TurnStreams
    trained: TurnData

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.data = cfg, cfg.data
        cfg.model.features, cfg.model.visual = {}, None  # streams of Emotion-LLaMA
        self.valid: TurnData | None = None

    def opens(self, device: torch.device, say: Callable[[str], None]) -> list[Callable[[], object]]:
        """What may go wrong before any connection is opened, each a call; they read files and load the towers."""
        cfg = self.cfg

        def read() -> None:
            self.turns = load_turns(cfg.data, cfg.seed, cfg.evaluate, cfg.test, say)

        def streams() -> None:
            towers = cfg.model.towers.vision_tower or cfg.model.towers.audio_tower
            folder = clip_folder(cfg.data.data_root, cfg.data.image_path) if towers else Path()
            self.streams = open_streams(cfg.model, cfg.support, folder, device)

        unread = partial(config.without, cfg, UNREAD, "turns of dialogues")
        return [unread, read, streams, lambda: check_data(cfg.data)]

    @property
    def labels(self) -> dict[str, list[str]]:
        prompt = self.cfg.support.prompt
        return {name: prompt.strategies if name == "strategy" else prompt.emotions for name in CLOSED}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How often each label of each closed field is trained."""
        return self.trained.class_counts()

    def parts(self, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[TurnData]:
        """What is trained on."""
        self.streams.scan([turn for turns in self.turns.values() for turn in turns], self.data.max_bad, say)
        augment = self.data.augment(AUGMENTATIONS)
        train = self.made(self.turns["train"], tokenizer).augmented(augment, self.cfg.seed)
        say(f"train: {len(train)} turns ({train.coverage()})")
        if augment:
            say(f"augmentation: {', '.join(f'{name} {p:g}' for name, p in augment.items())}")
        for name, counts in train.class_counts().items():
            say(f"  {name}: {counts}")
        if self.turns["valid"]:
            self.valid = self.made(self.turns["valid"], tokenizer)
            say(f"valid: {len(self.valid)} turns ({self.valid.coverage()})")
        self.trained = train
        return [train]

    def made(self, turns: list[Turn], tokenizer: Tokenizer) -> TurnData:
        return turn_data(turns, self.streams, self.cfg.support, self.cfg.model, tokenizer)

    def fit(self, mllm: Mllm, say: Callable[[str], None]) -> None:
        """Gives a new model the connectors that it is to start from, as far as they are for one like it."""
        if self.cfg.model.normalize:
            mllm.set_statistics(statistics(self.trained))
        source = self.cfg.model.towers.pretrain_projectors_repo
        if source is None:
            return
        for name in ("video", "audio"):
            if name in mllm.projections:
                try:
                    made = mllm.projections[name]
                    made = made.connector if isinstance(made, Standardised) else made
                    say(f"{name} connector of {source}: {load_projectors(source, **{name: made})}")
                except Unsuitable as error:
                    say(f"{error}: the connector of {name} starts from scratch")

    def follow(self, mllm: Mllm) -> None:
        """Nothing of a turn depends on the model."""

    def describe(self) -> dict[str, dict]:
        """How the streams are made, for the checkpoint."""
        return self.streams.describe()

    def validate(
        self, mllm: Mllm, tokenizer: Tokenizer, here: dist.Ranks, amp: Callable, log: Logger, step: int
    ) -> dict[str, Any]:
        """Scores of the validation turns, logged beside the commonest labels'; METRICS by their names."""
        cfg, valid = self.cfg, self.valid
        assert valid is not None
        records = support.ask(
            mllm, tokenizer, valid, cfg.decode, here, cfg.eval_batch_size, cfg.seed, cfg.eval_limit,
            respond=False, workers=cfg.num_workers, counts=self.counts,
        )  # fmt: skip
        found = support.evaluate(records, **self.choices())
        scores = summary(found)
        mine = (valid.sample(i) for i in range(here.rank, len(valid), here.world))
        scores["loss"] = emotion.loss(mllm, mine, here, cfg.eval_batch_size, amp)
        fields = {name: field for name, field in found["fields"].items() if field["rows"]}
        majority = {f"majority_{name}": field["majority"]["weighted_f1"] for name, field in fields.items()}
        log(step, **{f"valid/{name}": value for name, value in (scores | majority).items()})
        for name, field in fields.items():
            log.figure(f"valid/{name}", confusion_image(field["confusion"], field["labels"]), step)
            log.say(
                f"  {name}: weighted F1 {field['weighted_f1']:.4f}, majority {field['majority']['weighted_f1']:.4f}"
            )
        for record in records[:2]:
            log.say(f"  sample {record['id']}: {record['answer']!r}")
            log.text("valid/samples", record["answer"], step)
        return scores

    def choices(self) -> dict[str, list[str]]:
        return {"emotions": self.cfg.support.prompt.emotions, "strategies": self.cfg.support.prompt.strategies}

    def test(self, mllm: Mllm, tokenizer: Tokenizer, here: dist.Ranks, say: Callable[[str], None]) -> dict[str, Any]:
        """Scores on the test turns, with all that the run's modalities tell and without each of them."""
        cfg = self.cfg
        test = self.made(self.turns["test"], tokenizer)
        given = cfg.support.prompt.modalities
        results = {}
        for gone in (None, *given):
            left = [name for name in given if name != gone]
            if not left:
                continue
            records = support.ask(
                mllm, tokenizer, test.only(left), cfg.decode, here, cfg.eval_batch_size, cfg.seed,
                respond=gone is None, workers=cfg.num_workers, counts=self.counts,
            )  # fmt: skip
            found = support.evaluate(records, **self.choices())
            name = f"without {gone}" if gone else "all"
            results[name] = found
            if gone is None:
                say(f"test: {support.table(found)}")
            line = ", ".join(f"{field} {value['accuracy']:.4f}" for field, value in found["fields"].items()
                             if value["rows"])  # fmt: skip
            say(f"test, {name:<15}: accuracy of {line}")
        results["linear"] = linear(self.turns, cfg.support.prompt, cfg.model.towers.mamba_compressor is not None)
        say(linear_table(results["linear"]))
        return results

    def dry_run(self, say: Callable[[str], None]) -> None:
        """Prints what the run would cost."""
        model = self.cfg.model
        try:
            turn = read_turns(self.data.data_root, self.data.max_bad)[0][0]
        except UserError:
            turn = None
        source = f"turn {turn.id}" if turn else "a stand-in turn (the data are not here)"
        towers = {"video": model.towers.vision_tower, "audio": model.towers.audio_tower}
        values = {name: torch.empty(shapes(model.towers)[name], device="meta") for name in towers if towers[name]}

        def sample(encode: Encode) -> TurnSample:
            made = (turn or STAND_IN, Unseen(values), self.cfg.support, encode, model.places, model.max_len)
            return TurnData([made[0]], *made[1:], compressed=model.towers.mamba_compressor is not None).sample(0)

        sizes.report(model, self.cfg.batch_size, sample, source, say)


class Unseen:
    """Streams that every turn has, of which nothing but the shapes is known."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def slots(self, turn: Turn) -> list[str]:
        return list(self.values)

    def __call__(self, turn: Turn, wanted: Collection[str]) -> dict[str, Tensor]:
        return {name: value for name, value in self.values.items() if name in wanted}


def turn_data(
    turns: list[Turn], streams: TurnStreams, cfg: SupportConfig, model: MllmConfig, tokenizer: Tokenizer
) -> TurnData:
    """Turns as samples for this model, in the layout of conversations that its tokenizer knows the marks of."""
    compressed = model.towers.mamba_compressor is not None
    return TurnData(turns, streams, cfg, tokenizer.encode, model.places, model.max_len, compressed, layout(tokenizer))


def layout(tokenizer: Tokenizer) -> Chat:
    """The layout of conversations that a tokenizer knows the marks of."""
    return CHATML if START in tokenizer.specials else llama2


def check_data(data: DataConfig, known: Collection[str] = AUGMENTATIONS) -> None:
    """UserError for augmentations that turns have no use for; `known` are those that they have one for."""
    given = {"enable-augmentation": data.enable_augmentation and not known}
    given |= {f"augmentations {name}": True for name in data.augmentations if name not in known}
    if unread := [name for name, on in given.items() if on]:
        raise UserError(f"--data.{unread[0]}: not for turns of dialogues ({data.data_root})")
    check_probabilities(data)


def open_streams(model: MllmConfig, cfg: SupportConfig, folder: Path, device: torch.device) -> TurnStreams:
    """The towers, and the folder of the clips that they see and hear."""
    towers = model.towers
    eye, ear = load_towers(towers, device)
    return TurnStreams(
        folder, shapes(towers), eye, ear, num_k_vid=cfg.num_k_vid, num_frames=towers.num_frames,
        audio_seconds=towers.audio_seconds, audio_windows=towers.audio_windows,
    )  # fmt: skip


def shapes(cfg: TowerConfig) -> dict[str, tuple[int, ...]]:
    """Of what the towers make of a turn."""
    return {
        "video": (cfg.num_frames, cfg.patches, cfg.vision_width),
        "audio": (cfg.audio_tokens, cfg.audio_width),
    }


def statistics(data: TurnData) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the rows of video and of sound over some of the turns, in float64."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for turn in data.turns[:: -(-len(data) // STATISTICS)]:
        for name, value in data.streams(turn, data.cfg.prompt.modalities).items():
            rows[name].append(value.flatten(0, -2).double())
    found = {name: torch.std_mean(torch.cat(parts), 0, correction=0) for name, parts in rows.items()}
    return {name: (mean.float(), std.float()) for name, (std, mean) in found.items()}


def linear(turns: dict[str, list[Turn]], prompt: PromptConfig, compressed: bool) -> dict[str, Any]:
    """Field -> scores of a linear model of the words on test, which knows what a model with this prompt is told.

    How strongly it is held back is chosen on valid, without which there is none.
    """
    heard = {part for part in tfidf.PARTS if part == "client" or "history" in prompt.modalities}
    if not (prompt.history_labels or compressed):
        heard -= {"client_emotion_before", "strategy_before"}
    choices = [[part for part in tfidf.PARTS if part in heard]]
    splits = [turns[split] for split in ("train", "valid", "test")]
    found = {}
    for name in CLOSED if all(splits) and "text" in prompt.modalities else ():
        if name in prompt.fields and all(any(getattr(turn, name) for turn in part) for part in splits):
            labels = prompt.strategies if name == "strategy" else prompt.emotions
            found[name] = tfidf.baseline(splits[0], splits[1], splits[2], name, labels, choices)
    return found


def linear_table(found: dict[str, Any]) -> str:
    """The scores of linear() as aligned text."""
    if not found:
        return "no linear baseline: it needs words, training, validation and test turns"
    columns = ("accuracy", "weighted_f1", "macro_f1")
    rows: list[list[str]] = [["TF-IDF, logistic regression", *columns, "of"]]
    for name, scores in found.items():
        rows.append([name, *(f"{scores[column]:.4f}" for column in columns), ", ".join(scores["parts"])])
    return table_lines(rows)


def summary(found: dict[str, Any]) -> dict[str, float]:
    """One number a metric: means over the fields of closed choice, and each field's weighted F1 by its name."""
    fields = {name: field for name, field in found["fields"].items() if field["rows"]}
    if not fields:
        raise UserError("nothing to score: no turn has a label")
    means = {name: fmean(field[name] for field in fields.values()) for name in MEANS}
    return means | {name: field["weighted_f1"] for name, field in fields.items()}
