"""Emotion or sentiment of one clip, of a folder of clips or of a manifest; no labels needed.

$ python predict.py --ckpt out/llm_fast --input clip.mp4
$ python predict.py --ckpt out/voices --input clips/
$ python predict.py --ckpt out/stage2 --input clips/ --question "[reason] What does this person feel, and why?"
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from common import checkpoint, config, dist
from common.config import UserError, from_dict, opt
from data.clips import DataConfig, Sample, make_sample
from data.features import encode_clip
from data.manifest import Clip, read_manifest
from data.media import MediaError
from data.prompts import EMOTIONS9, emotion_question, parse_tagged, pick_question
from evals import emotion
from evals.emotion import DecodeConfig
from model import encoders, fusion, mllm

MEDIA = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".wav", ".flac", ".mp3", ".ogg", ".m4a", ".jpg", ".jpeg", ".png"}


@dataclass
class Config:
    ckpt: str = opt("", "a run folder (its best, else its last checkpoint) or one checkpoint", "--ckpt")
    input: str = opt("", "a media file, a folder of them, or a CSV/JSONL manifest", "--input")
    text: str | None = opt(None, "what the person says, for a single clip", "--text")
    question: str | None = opt(None, "'[reason] …' asks for text; without one the emotion is scored", "--question")
    llm: str | None = opt(None, "other place of the frozen language model than in training", "--llm")
    out: str | None = opt(None, "also write the answers to this .jsonl file", "--out")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    batch_size: int = opt(8, "clips decoded together", "--batch-size")
    decode: DecodeConfig = field(default_factory=DecodeConfig)


class Predictor:
    """A trained model with everything that turns a raw clip into its input; LlmPredictor and FusionPredictor below."""

    folder: Path
    coverage: str
    made: dict[str, dict]  # stream -> how its features were made
    encoders: dict[str, Any]

    def _load_encoders(self) -> None:
        self.encoders = {}
        for name, info in self.made.items():
            if info.get("encoder") in encoders.ENCODERS:  # else made by another tool, and given as features
                self.encoders[name] = encoders.load(info["encoder"], **info.get("options", {}))

    def __call__(
        self,
        clip: str | Path | Clip | None = None,
        text: str | None = None,
        audio: str | Path | None = None,
        video: str | Path | None = None,
        features: dict[str, Any] | None = None,
        question: str | None = None,
    ) -> dict:
        """Emotion, confidence and probabilities, or with a '[reason] …' question the answer; and the streams used."""
        if not isinstance(clip, Clip):
            clip = Clip(Path(clip or video or audio or "clip").stem, str(clip) if clip else None)
        clip = replace(clip, text=text if text is not None else clip.text)
        sample, missing = self.sample(clip, question, audio, video, features or {})
        return self.answer([sample], question, {sample.id: missing})[0]

    def batch(self, items: list[dict[str, Any]]) -> list[dict]:
        """One result an item, in order; an item holds the arguments of a call, and a bad one gives {"error"}."""
        if not items:
            raise UserError("no items to predict")
        results = []
        for number, item in enumerate(items):
            try:
                if not isinstance(item, dict):
                    raise UserError(f"item {number} is a {type(item).__name__}, not a dict")
                if unknown := sorted(set(item) - {"clip", "text", "audio", "video", "features", "question"}):
                    raise UserError(f"item {number}: unknown key {unknown[0]!r}")
                results.append(self(**item))
            except (MediaError, UserError) as error:
                results.append({"error": str(error)})
        return results

    def sample(
        self, clip: Clip, question: str | None, audio: Any = None, video: Any = None, features: dict | None = None
    ) -> tuple[Any, dict[str, str]]:
        """The clip as the model's input, which has an id, and why each absent stream is absent."""
        raise NotImplementedError  # a prompt for a language model, frames for fusion

    def answer(self, samples: list, question: str | None, missing: dict[str, dict[str, str]]) -> list[dict]:
        """What the model says to samples made by sample(), through the same code as evaluation."""
        raise NotImplementedError  # text and labels, or labels and a score

    def _encode(self, name: str, clip: Clip, audio: Any, video: Any) -> torch.Tensor:
        if name not in self.encoders:
            raise MediaError(f"{name}: made by another tool; pass its values as features")
        encoder = self.encoders[name]
        path = {"audio": audio, "video": video}.get(encoder.modality) or clip.path
        if path is None and encoder.modality != "text":
            raise MediaError(f"{name}: no {encoder.modality} given")
        made = self.made[name]
        clip = replace(clip, path=None if path is None else str(path))
        return encode_clip(clip, encoder, made["pooling"], made.get("frame", "middle"))


class LlmPredictor(Predictor):
    """Emotion-LLaMA: any question about a clip."""

    def __init__(
        self, folder: Path, device: torch.device, decode: DecodeConfig | None = None, llm: str | None = None
    ) -> None:
        state = checkpoint.read_state(folder)
        state["config"]["model"] |= {"llm": llm} if llm else {}
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.mllm, self.tokenizer, self.coverage = mllm.load(folder, state, device, dtype)
        self.folder = folder
        self.data = from_dict(DataConfig, state["config"]["data"])
        self.decode = decode or DecodeConfig()
        self.made = state["features"]
        self.visual = self.mllm.cfg.visual
        self._load_encoders()

    def sample(
        self, clip: Clip, question: str | None, audio: Any = None, video: Any = None, features: dict | None = None
    ) -> tuple[Sample, dict[str, str]]:
        """The clip as a prompt, and why each absent stream is absent."""
        values, missing = {}, {}
        if not (clip.text or "").strip():
            clip, missing["text"] = replace(clip, text=None), "no transcript given"
        for name in self.made:
            given = (features or {}).get(name)
            try:
                if given is not None:
                    value = torch.as_tensor(np.asarray(given), dtype=torch.float32)
                else:
                    value = self._encode(name, clip, audio, video)
            except MediaError as error:
                missing[name] = str(error)
                continue
            if name == self.visual:
                values |= {"image": value[1:], "cls": value[:1]}
            else:
                values[name] = value.reshape(1, -1)
        rows = self.mllm.cfg.rows()
        for name, value in values.items():
            if tuple(value.shape) != rows[name]:
                raise UserError(f"{clip.id}: {name} has shape {tuple(value.shape)}, the model expects {rows[name]}")
            if not torch.isfinite(value).all():
                raise UserError(f"{clip.id}: {name} has non-finite values")
        if not values and clip.text is None:
            raise MediaError(f"{clip.path or clip.id}: nothing to go by ({'; '.join(missing.values())})")
        task, asked = ("emotion", None) if question is None else parse_tagged(question)
        if not asked:
            listed = task == "emotion" and tuple(self.data.labels) != EMOTIONS9
            asked = emotion_question(self.data.labels) if listed else pick_question(task)
        sample = make_sample(clip, values, self.data, self.tokenizer.encode, task, asked, list(rows))
        return sample, missing

    def answer(self, samples: list[Sample], question: str | None, missing: dict[str, dict[str, str]]) -> list[dict]:
        """What the model says to samples made by sample(), through the same code as evaluation."""
        scored = question is None or samples[0].task == "emotion"
        decode = replace(self.decode, decode="score" if scored else "generate")
        out = []
        for record in emotion.answer(self.mllm, self.tokenizer, samples, self.data.labels, decode, len(samples)):
            absent = missing[record["id"]]
            streams = [name for name in (*self.made, "text") if name not in absent]
            result = {"id": record["id"], "available_modalities": streams, "missing": absent}
            if scored:
                probabilities = record["probabilities"]
                result |= {"emotion": record["prediction"], "confidence": probabilities[record["prediction"]],
                           "probabilities": probabilities}  # fmt: skip
            else:
                result |= {"answer": record["answer"], "emotion": record["prediction"]}
            out.append(result)
        return out


class FusionPredictor(Predictor):
    """Sentiment from text, audio and video features; the mean of the checkpoint's seeds.

    With context a clip is a video of its own.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        state = checkpoint.read_state(folder)
        self.model, self.coverage = fusion.load(folder, state, device)
        self.folder, self.made, self.labels = folder, state["features"], state["labels"]
        self._load_encoders()

    def sample(
        self, clip: Clip, question: str | None, audio: Any = None, video: Any = None, features: dict | None = None
    ) -> tuple[Any, dict[str, str]]:
        """The clip's frames of each modality, and why each absent one is absent."""
        if question is not None:
            raise UserError("this checkpoint answers no questions: it scores sentiment")
        values, missing = {}, {}
        if unknown := sorted(set(features or {}) - set(self.model.dims)):
            raise UserError(f"{clip.id}: features {unknown[0]!r}, the model has {', '.join(self.model.dims)}")
        for name, dim in self.model.dims.items():
            given = (features or {}).get(name)
            try:
                value = self._encode(name, clip, audio, video) if given is None else torch.as_tensor(np.asarray(given))
            except MediaError as error:
                missing[name] = str(error)
                continue
            value = torch.atleast_2d(value)
            if value.ndim != 2 or value.shape[1] != dim:
                raise UserError(f"{clip.id}: {name} has shape {tuple(value.shape)}, the model expects (T, {dim})")
            if not (value != 0).any():
                missing[name] = f"{name}: all zeros"
            elif not torch.isfinite(value).any():
                missing[name] = f"{name}: no finite value"
            else:
                values[name] = value[: self.model.frames[name]].float()
        if not values:
            raise MediaError(f"{clip.path or clip.id}: nothing to go by ({'; '.join(missing.values())})")
        return SimpleNamespace(id=clip.id, values=values), missing

    @torch.inference_mode()
    def answer(self, samples: list, question: str | None, missing: dict[str, dict[str, str]]) -> list[dict]:
        """Label, confidence, probabilities and score of each sample."""
        device = self.model.classifier.weight.device
        groups = [[sample] for sample in samples] if self.model.context is not None else [samples]
        results = []
        for group in groups:
            x = []
            for name, dim in self.model.dims.items():
                x.append(torch.zeros(len(group), self.model.frames[name], dim, device=device))
                for row, sample in zip(x[-1], group, strict=True):
                    if name in sample.values:
                        row[: len(sample.values[name])] = sample.values[name]
            logits = self.model(*x).view(-1, len(group), len(self.labels))  # (K, B, C)
            head = self.model.cfg.head
            p = fusion.probabilities(logits, head).mean(0).tolist()
            score = fusion.scores(logits, head).mean(0).tolist() if head != "emotions" else [None] * len(group)
            for sample, row, value in zip(group, p, score, strict=True):
                results.append(self._result(sample.id, row, value, missing[sample.id]))
        return results

    def _result(self, id: str, p: list[float], score: float | None, missing: dict[str, str]) -> dict:
        result: dict[str, Any] = {"id": id, "available_modalities": [m for m in self.model.dims if m not in missing]}
        result["missing"] = missing
        if self.model.cfg.head == "regression":
            assert score is not None
            named = fusion.SENTIMENTS[round(max(-3.0, min(3.0, score))) + 3]
            return result | {"emotion": named, "score": score}
        best = max(range(len(p)), key=p.__getitem__)
        result |= {"emotion": self.labels[best], "confidence": p[best]}
        result["probabilities"] = dict(zip(self.labels, p, strict=True))
        return result if score is None else result | {"score": score}


def load(
    ckpt: str | Path, device: str = "cpu", decode: DecodeConfig | None = None, llm: str | None = None
) -> Predictor:
    """A Predictor from a run folder (its best, else its last checkpoint) or from one checkpoint.

    `llm`: where the frozen language model lies, if it has moved since training.
    """
    folder, place = checkpoint.resolve(ckpt, prefer="best"), dist.ranks(device).device
    if checkpoint.read_state(folder).get("system") == "mosei":
        return FusionPredictor(folder, place)
    return LlmPredictor(folder, place, decode, llm)


def read_input(path: str, text: str | None) -> list[Clip]:
    """Clips of a media file, a folder or a manifest."""
    given = Path(path)
    if given.suffix in (".csv", ".jsonl"):
        return read_manifest(given)
    if given.is_dir():
        files = sorted(file for file in given.rglob("*") if file.suffix.lower() in MEDIA)
        if not files:
            raise UserError(f"--input {path}: no media files ({', '.join(sorted(MEDIA))})")
        return [Clip(str(file.relative_to(given)), str(file)) for file in files]
    if not given.is_file():
        raise UserError(f"--input {path!r}: not found (a media file, a folder or a .csv/.jsonl manifest)")
    return [Clip(given.stem, str(given), text=text)]


def predictions(predictor: Predictor, clips: list[Clip], question: str | None, batch_size: int) -> Iterator[dict]:
    """Answers in order; a clip that cannot be read gives {"id", "error"} and the others go on."""
    for start in range(0, len(clips), batch_size):
        results: dict[str, dict] = {}
        samples, missing = [], {}
        for clip in clips[start : start + batch_size]:
            try:
                sample, missing[clip.id] = predictor.sample(clip, question)
                samples.append(sample)
            except (MediaError, UserError) as error:
                results[clip.id] = {"id": clip.id, "error": str(error)}
        if samples:
            results |= {result["id"]: result for result in predictor.answer(samples, question, missing)}
        yield from (results[clip.id] for clip in clips[start : start + batch_size])


def main(cfg: Config) -> None:
    if not cfg.ckpt or not cfg.input:
        raise UserError(f"--{'input' if cfg.ckpt else 'ckpt'} is needed (see --help)")
    clips = read_input(cfg.input, cfg.text)
    predictor = load(cfg.ckpt, cfg.device, cfg.decode, cfg.llm)
    print(f"{predictor.folder}: {predictor.coverage}")
    bad = 0
    with open(cfg.out, "w", encoding="utf-8") if cfg.out else open("/dev/null", "w") as file:
        for result in predictions(predictor, clips, cfg.question, cfg.batch_size):
            bad += "error" in result
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            print(line(result), flush=True)
    if bad:
        print(f"{bad} of {len(clips)} clips could not be read")


def line(result: dict) -> str:
    """One result for the terminal."""
    if "error" in result:
        return f"{result['id']}: skipped: {result['error']}"
    gone = f"  (without {', '.join(result['missing'])})" if result["missing"] else ""
    if "answer" in result:
        return f"{result['id']}: {result['answer']}{gone}"
    if "probabilities" not in result:
        return f"{result['id']}: {result['emotion']}  [score {result['score']:.2f}]{gone}"
    top = sorted(result["probabilities"].items(), key=lambda item: -item[1])[:3]
    return f"{result['id']}: {result['emotion']}  [{', '.join(f'{label} {p:.2f}' for label, p in top)}]{gone}"


if __name__ == "__main__":
    config.run(Config, main)
