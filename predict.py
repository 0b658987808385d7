"""Emotion or sentiment of one clip, of a folder of clips or of a manifest; no labels needed.

$ python predict.py --ckpt out/llm_fast --input clip.mp4
$ python predict.py --ckpt out/voices --input clips/
$ python predict.py --ckpt out/stage2 --input clips/ --question "[reason] What does this person feel, and why?"
$ python predict.py --ckpt out/slm --input clip.wav --text "I am so glad that you came."
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from common import checkpoint, config, dist
from common.config import UserError, from_dict, opt
from data.clips import ClipSample, DataConfig, make_sample
from data.features import Memory, encode_clip
from data.manifest import Clip, read_manifest
from data.media import MediaError
from data.mesc import CHAT, Turn, Utterance, read_turns
from data.pairs import MODALITIES, assemble, relative, speaker_statistics, standardize_speakers
from data.prompts import LAYOUTS, parse_tagged, pick_question
from data.resident import read
from data.streams import clip_folder
from data.support import parse_answer
from data.turns import SupportConfig, is_turns
from evals import emotion, speech, support
from evals.emotion import DecodeConfig, Follow
from evals.turns import open_streams, turn_data
from model import combine as ensemble
from model import encoders, fusion, meld, mllm, published, slm
from model.combine import WAYS
from model.published import PublishedConfig

MEDIA = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".wav", ".flac", ".mp3", ".ogg", ".m4a", ".jpg", ".jpeg", ".png"}
ALONE = "no other clip of its speaker is known, by which the sound would be standardised"


@dataclass
class Config:
    ckpt: list[str] = opt(
        [], "a run folder (its best, else its last checkpoint), one checkpoint or a published .pth", "--ckpt"
    )
    combine: str | None = opt(
        None, "several --ckpt as one: the mean of their weights, or of their predictions", "--combine", choices=WAYS
    )
    input: str = opt("", "a media file, a folder of them, or a CSV/JSONL manifest", "--input")
    text: str | None = opt(None, "what the person says, for a single clip", "--text")
    question: str | None = opt(None, "'[reason] …' asks for text; without one the emotion is scored", "--question")
    chat: bool = opt(False, "ask one clip questions from the keyboard, each with those before in mind", "--chat")
    llm: str | None = opt(None, "other place of the frozen language model than in training", "--llm")
    out: str | None = opt(None, "also write the answers to this .jsonl file", "--out")
    device: str = opt("auto", "cpu, cuda or cuda:N", "--device")
    batch_size: int = opt(8, "clips decoded together", "--batch-size")
    prompt_layout: str | None = opt(None, "another prompt layout than in training", choices=LAYOUTS)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    model: PublishedConfig = field(default_factory=PublishedConfig)  # read for a published .pth only


class Predictor:
    """A trained model with everything that turns a raw clip into its input; one class a kind of checkpoint below."""

    folder: Path
    coverage: str
    together: str | None = None  # the field of Clip whose equals are answered in one batch

    def __init__(self, made: dict[str, dict]) -> None:
        self.made = made  # stream -> how its features were made
        self._encoders: dict[str, Any] = {}

    def inputs(self, path: str, text: str | None) -> list[Any]:
        """What --input names."""
        return read_input(path, text)

    def encoder(self, name: str) -> Any:
        """The encoder of a stream, loaded when first asked for; None if another tool made its features."""
        info = self.made[name]
        if name not in self._encoders and info.get("encoder") in encoders.ENCODERS:
            self._encoders[name] = encoders.load(info["encoder"], **info.get("options", {}))
        return self._encoders.get(name)

    def __call__(
        self,
        clip: str | Path | Clip | None = None,
        text: str | None = None,
        audio: str | Path | None = None,
        video: str | Path | None = None,
        features: dict[str, Any] | None = None,
        question: str | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> dict:
        """Emotion, confidence and probabilities, or with a '[reason] …' question the answer; and the streams used.

        `turns`: (question, answer) of what was asked about this clip before.
        """
        if not isinstance(clip, Clip):
            clip = Clip(Path(clip or video or audio or "clip").stem, str(clip) if clip else None)
        clip = replace(clip, text=text if text is not None else clip.text)
        sample, missing = self.sample(clip, question, audio, video, features or {}, turns)
        result = self.answer([sample], question, {sample.id: missing})[0]
        if "error" in result:
            raise UserError(result["error"])
        return result

    def batch(self, items: list[dict[str, Any]]) -> list[dict]:
        """One result an item, in order; an item holds the arguments of a call, and a bad one gives {"error"}."""
        if not items:
            raise UserError("no items to predict")
        results = []
        for number, item in enumerate(items):
            try:
                if not isinstance(item, dict):
                    raise UserError(f"item {number} is a {type(item).__name__}, not a dict")
                if unknown := sorted(set(item) - {"clip", "text", "audio", "video", "features", "question", "turns"}):
                    raise UserError(f"item {number}: unknown key {unknown[0]!r}")
                results.append(self(**item))
            except (MediaError, UserError) as error:
                results.append({"error": str(error)})
        return results

    def sample(
        self,
        clip: Clip,
        question: str | None,
        audio: Any = None,
        video: Any = None,
        features: dict | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> tuple[Any, dict[str, str]]:
        """The clip as the model's input, which has an id, and why each absent stream is absent."""
        raise NotImplementedError  # a prompt for a language model, frames for the others

    def answer(
        self, samples: list, question: str | None, missing: dict[str, dict[str, str]], follow: Follow | None = None
    ) -> list[dict]:
        """What the model says to samples made by sample(), through the same code as evaluation.

        `follow` sees generated text grow.
        """
        raise NotImplementedError  # text and labels, or labels and a score

    def _values(
        self, clip: Clip, dims: dict[str, int], audio: Any, video: Any, features: dict[str, Any],
        ids: Sequence[str] = (),
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:  # fmt: skip
        """Frames (T, D) of each stream of `dims`, of `ids` (T,), given or made now; and why each other is absent."""
        if unknown := sorted(set(features) - set(dims)):
            raise UserError(f"{clip.id}: features {unknown[0]!r}, the model has {', '.join(dims)}")
        values, missing = {}, {}
        for name, dim in dims.items():
            given = features.get(name)
            try:
                value = self._encode(name, clip, audio, video) if given is None else torch.as_tensor(np.asarray(given))
                values[name] = (checked_ids if name in ids else checked_frames)(value, dim, name, clip.id)
            except MediaError as error:
                missing[name] = str(error)
        return values, missing

    def _encode(self, name: str, clip: Clip, audio: Any, video: Any) -> torch.Tensor:
        encoder = self.encoder(name)
        if encoder is None:
            raise MediaError(f"{name}: made by another tool; pass its values as features")
        path = {"audio": audio, "video": video}.get(encoder.modality) or clip.path
        if path is None and encoder.modality != "text":
            raise MediaError(f"{name}: no {encoder.modality} given")
        made = self.made[name]
        clip = replace(clip, path=None if path is None else str(path))
        return encode_clip(clip, encoder, made["pooling"], made.get("frame", "middle"))


class LanguagePredictor(Predictor):
    """A multimodal language model, its tokenizer and what its run was told of its data."""

    def __init__(
        self,
        folders: list[Path],
        device: torch.device,
        decode: DecodeConfig | None = None,
        llm: str | None = None,
        combine: str | None = None,
        shape: PublishedConfig | None = None,
    ) -> None:
        """Of one checkpoint, of several by a way to `combine` them, or of a published .pth of this shape."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.folder = folders[0]
        if is_published(self.folder):
            shape = shape or PublishedConfig()
            super().__init__(shape.made())
            self.data, self.support, self.counts = DataConfig(), SupportConfig(), {}
            loaded = published.load(self.folder, shape, llm, device, dtype)
        else:
            states = [checkpoint.read_state(folder) for folder in folders]
            super().__init__(states[0]["features"])
            states[0]["config"]["model"] |= {"llm": llm} if llm else {}
            self.seed: int = states[0]["config"]["seed"]
            self.data = from_dict(DataConfig, states[0]["config"]["data"])
            self.support = from_dict(SupportConfig, states[0]["config"].get("support", {}))
            self.counts: dict[str, dict[str, int]] = states[0].get("counts", {})
            if combine:
                loaded = ensemble.load(folders, states, combine, device, dtype)
            else:
                loaded = mllm.load(self.folder, states[0], device, dtype)
        self.mllm, self.tokenizer, self.coverage = loaded
        self.name = "+".join(names(folders)) + (f"-{combine}" if combine else "")
        if combine:
            self.coverage = f"{combine} of {', '.join(map(str, folders))} combined, {self.coverage}"
        self.decode = decode or DecodeConfig()
        emotion.check(self.decode, bool(self.counts))


class LlmPredictor(LanguagePredictor):
    """Emotion-LLaMA: any question about a clip.

    With --speaker-norm a speaker's other clips are looked for among those that are answered together: of a manifest
    that names speakers. The only clip of its speaker is refused, unless it has no utterance features.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.visual = self.mllm.cfg.visual
        self.together = "speaker" if self.data.speaker_norm else None

    def sample(
        self,
        clip: Clip,
        question: str | None,
        audio: Any = None,
        video: Any = None,
        features: dict | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> tuple[ClipSample, dict[str, str]]:
        """The clip as a prompt, and why each absent stream is absent."""
        clip, values, missing = self.read(clip, audio, video, features or {})
        return self.ask(clip, values, question, turns), missing

    def read(
        self, clip: Clip, audio: Any = None, video: Any = None, features: dict[str, Any] | None = None
    ) -> tuple[Clip, dict[str, torch.Tensor], dict[str, str]]:
        """The clip, the values of its slots, and why each absent stream is absent."""
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
        return clip, values, missing

    def ask(
        self, clip: Clip, values: dict[str, torch.Tensor], question: str | None, turns: Sequence[tuple[str, str]] = ()
    ) -> ClipSample:
        """The prompt of a question about a clip that read() has read, after earlier turns."""
        task, asked = self._asked(question)
        turns = [("[{}] {}".format(*self._asked(earlier)), said) for earlier, said in turns]
        slots = list(self.mllm.cfg.rows())
        return make_sample(clip, values, self.data, self.tokenizer.encode, task, asked, slots, turns=turns)

    def _asked(self, question: str | None) -> tuple[str, str]:
        """Task and wording of a question; a task alone asks the first question of its pool."""
        task, asked = ("emotion", None) if question is None else parse_tagged(question)
        return task, asked or pick_question(task, None, self.data.labels, self.data.question)

    def answer(
        self,
        samples: list[ClipSample],
        question: str | None,
        missing: dict[str, dict[str, str]],
        follow: Follow | None = None,
    ) -> list[dict]:
        """What the model says to samples made by sample(), through the same code as evaluation."""
        alone = self._standardize(samples) if self.together else set()
        results = {id: {"id": id, "error": f"{id}: {ALONE} (a manifest can name it)"} for id in alone}
        known = [sample for sample in samples if sample.id not in alone]
        results |= {result["id"]: result for result in self._answers(known, question, missing, follow)}
        return [results[sample.id] for sample in samples]

    def _standardize(self, samples: list[ClipSample]) -> set[str]:
        """Standardises utterance features by speaker; the ids of those that no other clip of theirs stands beside."""
        alone = set()
        slots = self.mllm.cfg.features
        for speaker in {sample.speaker for sample in samples}:
            for name in slots:
                own = [s for s in samples if s.speaker == speaker and name in s.values]
                if speaker is None or len(own) == 1:
                    alone |= {sample.id for sample in own}
                elif own:
                    statistics = speaker_statistics(speaker, torch.cat([sample.values[name] for sample in own]))
                    for sample in own:
                        sample.values[name] = relative(sample.values[name], *statistics)
        return alone

    def _answers(
        self, samples: list[ClipSample], question: str | None, missing: dict[str, dict[str, str]], follow: Follow | None
    ) -> list[dict]:
        if not samples:
            return []
        scored = question is None or samples[0].task == "emotion"
        decode = replace(self.decode, decode="score" if scored else "generate")
        out = []
        # a speaker's clips may be more than --batch-size asks for
        size = 8 if self.together else len(samples)
        for record in emotion.answer(self.mllm, self.tokenizer, samples, self.data.labels, decode, size,
                                     follow=follow, counts=self.counts.get("emotion")):  # fmt: skip
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


class TurnPredictor(LanguagePredictor):
    """MultiMood: what a client feels, and the therapist's emotion, strategy and reply.

    A clip is what the client has just said, its text the client's words, `turns` what client and therapist said before.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.device = next(self.mllm.parameters()).device
        self.streams = open_streams(self.mllm.cfg, self.support, Path(), self.device)

    def inputs(self, path: str, text: str | None) -> list[Any]:
        """The turns of a file of them, whose answers need not be there, or one turn of a media file."""
        if not is_turns(path):
            return list(read_input(path, text))
        turns, listing = read_turns(path, self.data.max_bad, answered=False)
        print(listing)
        if self.streams.encoders:
            folder = clip_folder(path, None)
            turns = [replace(turn, clips=[str((folder / clip).resolve()) for clip in turn.clips]) for turn in turns]
        return turns

    def sample(
        self,
        clip: Any,
        question: str | None,
        audio: Any = None,
        video: Any = None,
        features: dict | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> tuple[Any, dict[str, str]]:
        """A turn, or a clip as one, as a prompt, and why each absent stream is absent."""
        if question is not None or features or audio or video:
            raise UserError("this checkpoint answers what a client says: a clip, its text and what was said before")
        turn = clip if isinstance(clip, Turn) else as_turn(clip, turns)
        turn = replace(turn, therapist="", client_emotion=None, therapist_emotion=None, strategy=None)
        data = turn_data([turn], self.streams, self.support, self.mllm.cfg, self.tokenizer)
        sample = data.sample(0)
        known = {"text": turn.client, "history": turn.history} | sample.values
        missing = {name: "not given" for name in self.support.prompt.modalities if not len(known.get(name, ""))}
        if {"text", "video", "audio"} <= missing.keys() | ({"video", "audio"} - set(self.streams.encoders)):
            raise MediaError(f"{turn.id}: nothing to go by (neither words nor a clip that can be read)")
        return sample, missing

    def answer(
        self, samples: list, question: str | None, missing: dict[str, dict[str, str]], follow: Follow | None = None
    ) -> list[dict]:
        """The four fields for samples made by sample(), through the same code as evaluation."""
        results = []
        records = support.answer(
            self.mllm, self.tokenizer, samples, self.support.prompt, self.decode, max(len(samples), 1), follow=follow,
            counts=self.counts,
        )  # fmt: skip
        for record in records:
            absent, said = missing[record["id"]], parse_answer(record["answer"])
            streams = [name for name in self.support.prompt.modalities if name not in absent]
            result = {"id": record["id"], **said, "answer": said["response"] or record["answer"]}
            result |= {"emotion": said["client_emotion"], "available_modalities": streams, "missing": absent}
            if found := record.get("probabilities"):
                result |= {"probabilities": found["client_emotion"], "strategies": found["strategy"]}
                result["confidence"] = max(result["probabilities"].values())
            results.append(result)
        return results


def as_turn(clip: Clip, turns: Sequence[tuple[str, str]]) -> Turn:
    """What a client says in a clip, after (client, therapist) of what was said before."""
    said = [Utterance(role, None, text) for pair in turns for role, text in zip(CHAT, pair, strict=True)]
    path = [] if clip.path is None else [str(Path(clip.path).resolve())]
    return Turn(clip.id, clip.id, None, "", "", clip.text or "", "", None, None, None, path, said)


class FusionPredictor(Predictor):
    """Sentiment from text, audio and video features; the mean of the checkpoint's seeds.

    With context a clip is a video of its own.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        state = checkpoint.read_state(folder)
        super().__init__(state["features"])
        self.model, self.coverage = fusion.load(folder, state, device)
        self.folder, self.labels = folder, state["labels"]

    def sample(
        self,
        clip: Clip,
        question: str | None,
        audio: Any = None,
        video: Any = None,
        features: dict | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> tuple[Any, dict[str, str]]:
        """The clip's frames of each modality, and why each absent one is absent."""
        if question is not None or turns:
            raise UserError("this checkpoint answers no questions: it scores sentiment")
        values, missing = self._values(clip, self.model.dims, audio, video, features or {})
        if not values:
            raise MediaError(f"{clip.path or clip.id}: nothing to go by ({'; '.join(missing.values())})")
        values = {name: value[: self.model.frames[name]] for name, value in values.items()}
        return SimpleNamespace(id=clip.id, values=values), missing

    @torch.inference_mode()
    def answer(
        self, samples: list, question: str | None, missing: dict[str, dict[str, str]], follow: Follow | None = None
    ) -> list[dict]:
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


class SpeechPredictor(Predictor):
    """An emotion from sound and words; the mean of the checkpoint's seeds.

    What was said before (meld_train.py --context) is looked for among the clips that are answered together: those of
    a manifest, if they name their `dialogue`. So are the speaker's other clips, by which --speaker-norm standardises
    sound; of the only clip of its `speaker` frames are standardised by themselves, and one vector cannot be.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        state = checkpoint.read_state(folder)
        super().__init__(state["features"])
        if state["system"] == "meld":
            self.model, self.coverage = meld.load(folder, state, device)
            self.fronts = self.model.fronts
        else:
            self.model, self.coverage = slm.load(folder, state, device)
            self.fronts = self.model.clap
        self.folder, self.labels, self.seeds, self.device = folder, state["labels"], len(state["seeds"]), device
        self.sources = {name: self.fronts.sources[name] for name in self.made}
        made = state["config"]
        self.max_frames, self.context = made["data"]["max_frames"], made["model"].get("context", 0)
        self.own: str | None = None  # the stream that is standardised by speaker
        if made["data"].get("speaker_norm"):
            self.own = "stats" if "stats" in self.sources else "audio"
        self.together = "dialogue" if self.context else "speaker" if self.own else None

    def sample(
        self,
        clip: Clip,
        question: str | None,
        audio: Any = None,
        video: Any = None,
        features: dict | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> tuple[Any, dict[str, str]]:
        """The clip's frames or ids of each stream, and why each absent one is absent."""
        if question is not None or turns:
            raise UserError("this checkpoint answers no questions: it names an emotion")
        dims = {name: source["dim"] for name, source in self.sources.items()}
        ids = [name for name, source in self.sources.items() if source["kind"] == "ids"]
        values, missing = self._values(clip, dims, audio, video, features or {}, ids)
        for name, value in values.items():
            if len(value) > 1 and name not in ids and not self.sources[name]["frames"]:
                raise UserError(f"{clip.id}: {name} has {len(value)} frames, the model expects one vector")
        if not values.keys() & set(MODALITIES):
            raise MediaError(f"{clip.path or clip.id}: nothing to go by ({'; '.join(missing.values())})")
        clip = replace(clip, speaker=clip.speaker or clip.id)  # unknown speakers are all different
        return SimpleNamespace(id=clip.id, clip=clip, values=values), missing

    def answer(
        self, samples: list, question: str | None, missing: dict[str, dict[str, str]], follow: Follow | None = None
    ) -> list[dict]:
        """Label, confidence and probabilities of each sample."""
        counts = Counter(sample.clip.speaker for sample in samples if self.own in sample.values)
        results = {}
        for sample in samples:
            if self.own not in sample.values or counts[sample.clip.speaker] > 1:
                continue
            missing = missing | {sample.id: missing[sample.id] | {"speaker": ALONE}}
            if len(sample.values[self.own]) == 1:
                results[sample.id] = {"id": sample.id, "error": f"{sample.id}: {ALONE} (a manifest can name it)"}
        results |= self._answers([sample for sample in samples if sample.id not in results], missing)
        return [results[sample.id] for sample in samples]

    @torch.inference_mode()
    def _answers(self, samples: list, missing: dict[str, dict[str, str]]) -> dict[str, dict]:
        """The result of each sample by its id."""
        if not samples:
            return {}
        parts = {}
        for name, source in self.sources.items():
            held = {sample.id: sample.values[name] for sample in samples if name in sample.values}
            store = Memory(held, source["dim"], source["kind"])
            parts[name] = read([sample.id for sample in samples], store, self.max_frames)
        clips = [sample.clip for sample in samples]
        if self.own:
            standardize_speakers(parts[self.own], clips)
        data = assemble(clips, parts, self.labels, self.context).to(self.device)
        data.standardize(self.fronts.dense, self.fronts.standardize)
        p = speech.predict(self.model, data, self.seeds).softmax(-1).mean(0)
        knows = (data.before[:-1] < len(data)).any(1) if self.context else torch.ones(len(data))
        results = {}
        for sample, row, known in zip(samples, p.tolist(), knows.tolist(), strict=True):
            absent = missing[sample.id]
            if not known:
                absent = absent | {"context": "no earlier utterance of its dialogue is known"}
            best = max(range(len(row)), key=row.__getitem__)
            results[sample.id] = {
                "id": sample.id, "available_modalities": [m for m in MODALITIES if m in sample.values],
                "missing": absent, "emotion": self.labels[best], "confidence": row[best],
                "probabilities": dict(zip(self.labels, row, strict=True)),
            }  # fmt: skip
        return results


def checked_frames(value: torch.Tensor, dim: int, name: str, id: str) -> torch.Tensor:
    """Features (D,) or (T, D) as frames (T, D); UserError for another shape, MediaError if nothing is in them."""
    value = torch.atleast_2d(value)
    if value.ndim != 2 or value.shape[1] != dim:
        raise UserError(f"{id}: {name} has shape {tuple(value.shape)}, the model expects (T, {dim})")
    if not (value != 0).any():
        raise MediaError(f"{name}: all zeros")
    if not torch.isfinite(value).any():
        raise MediaError(f"{name}: no finite value")
    return value.float()


def checked_ids(value: torch.Tensor, dim: int, name: str, id: str) -> torch.Tensor:
    """Ids (T,) into a table of `dim` rows; UserError for something else, MediaError if there is none."""
    if not value.numel():
        raise MediaError(f"{name}: empty")
    if value.ndim != 1 or value.is_floating_point() or not 0 <= int(value.min()) <= int(value.max()) < dim:
        raise UserError(f"{id}: {name} must be whole numbers (T,) from 0 to {dim - 1}")
    return value


PREDICTORS = {"mosei": FusionPredictor, "slm": SpeechPredictor, "meld": SpeechPredictor}


def load(
    ckpt: str | Path | Sequence[str | Path],
    device: str = "cpu",
    decode: DecodeConfig | None = None,
    llm: str | None = None,
    combine: str | None = None,
    shape: PublishedConfig | None = None,
) -> Predictor:
    """A Predictor from a run folder (its best, else its last checkpoint) or one checkpoint, or from several combined.

    `llm`: where the frozen language model lies, if it has moved since training. `combine`: weights or predictions.
    `shape`: of the model that a published .pth belongs to.
    """
    folders, place = resolve([ckpt] if isinstance(ckpt, str | Path) else ckpt, combine), dist.ranks(device).device
    system = None if is_published(folders[0]) else checkpoint.read_state(folders[0]).get("system")
    if shape not in (None, PublishedConfig()) and not is_published(folders[0]):
        raise UserError(f"{folders[0]}: a checkpoint of a run knows its shape; the options model.* are of a .pth")
    if system == "clap":
        better = "train_slm.py --clap-ckpt makes a classifier of them"
        raise UserError(f"{folders[0]}: projectors predict no emotion; {better}")
    if system in PREDICTORS:
        return PREDICTORS[system](folders[0], place)
    if combine == "predictions" and decode and decode.num_beams > 1:
        raise UserError(f"--num-beams {decode.num_beams}: --combine predictions has no beams")
    dialogues = system is None and not is_published(folders[0]) and is_turns(root_of(folders[0]))
    if dialogues and checkpoint.read_state(folders[0])["config"]["support"].get("reconstruct", "none") != "none":
        better = f"train_llm.py --mamba-compressor {folders[0]} goes on with it"
        raise UserError(f"{folders[0]}: a history compressor alone, which answers nothing; {better}")
    return (TurnPredictor if dialogues else LlmPredictor)(folders, place, decode, llm, combine, shape)


def root_of(folder: Path) -> str:
    """What the run of a language model's checkpoint was trained on."""
    return checkpoint.read_state(folder)["config"]["data"]["data_root"]


def is_published(path: Path) -> bool:
    """Whether this is a file as Emotion-LLaMA publishes its weights, and not a checkpoint of a run."""
    return path.suffix == ".pth"


def resolve(given: Sequence[str | Path], combine: str | None) -> list[Path]:
    """The checkpoints to evaluate; UserError where they are not one, or several language models' to combine."""
    if not combine and len(given) > 1:
        ways = " or ".join(f"--combine {way}" for way in WAYS)
        raise UserError(f"--ckpt: {len(given)} checkpoints, which {ways} makes one of")
    if combine and len(given) < 2:
        raise UserError(f"--combine {combine}: needs several checkpoints, --ckpt A B ...")
    if not combine and is_published(Path(given[0])) and Path(given[0]).is_file():
        return [Path(given[0])]
    folders = [checkpoint.resolve(path, prefer="best") for path in given]
    for folder in folders if combine else []:
        if (system := checkpoint.read_state(folder).get("system")) is not None:
            raise UserError(f"{folder}: a checkpoint of {system} is not combined, only those of train_llm.py are")
    return folders


def names(folders: Sequence[Path]) -> list[str]:
    """What tells checkpoints apart: their names, and before those of another run than the first's that run's."""
    runs = [checkpoint.run_of(folder) for folder in folders]
    return [
        folder.stem if is_published(folder) else folder.name if run == runs[0] else f"{run.name}.{folder.name}"
        for folder, run in zip(folders, runs, strict=True)
    ]


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
    for part in batches(clips, batch_size, predictor.together):
        results: dict[str, dict] = {}
        samples, missing = [], {}
        for clip in part:
            try:
                sample, missing[clip.id] = predictor.sample(clip, question)
                samples.append(sample)
            except (MediaError, UserError) as error:
                results[clip.id] = {"id": clip.id, "error": str(error)}
        if samples:
            results |= {result["id"]: result for result in predictor.answer(samples, question, missing)}
        yield from (results[clip.id] for clip in part)


def batches(clips: list[Clip], size: int, together: str | None) -> Iterator[list[Clip]]:
    """The clips in order, `size` at a time, or more: those that are alike in the field `together` stay in one batch."""
    keys = [getattr(clip, together) if together else None for clip in clips]
    last = {key: i for i, key in enumerate(keys) if key is not None}
    start = end = 0
    for i, key in enumerate(keys):
        end = max(end, last.get(key, i))
        if i == len(clips) - 1 or (i == end and i + 1 - start >= size):
            yield clips[start : i + 1]
            start = i + 1


def main(cfg: Config) -> None:
    if not cfg.ckpt or not cfg.input:
        raise UserError(f"--{'input' if cfg.ckpt else 'ckpt'} is needed (see --help)")
    predictor = load(cfg.ckpt, cfg.device, cfg.decode, cfg.llm, cfg.combine, cfg.model)
    if not isinstance(predictor, LanguagePredictor):
        config.only(cfg, ("ckpt", "input", "text", "out", "device", "batch_size"), "this checkpoint")
    clips = predictor.inputs(cfg.input, cfg.text)
    prepare(predictor, cfg.prompt_layout)
    if cfg.chat:
        return chat(predictor, clips, cfg)
    bad = 0
    with open(cfg.out, "w", encoding="utf-8") if cfg.out else open("/dev/null", "w") as file:
        for result in predictions(predictor, clips, cfg.question, cfg.batch_size):
            bad += "error" in result
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            print(line(result), flush=True)
    if bad:
        print(f"{bad} of {len(clips)} clips could not be read")


def prepare(predictor: Predictor, prompt_layout: str | None) -> None:
    """Sets another prompt layout, and loads the encoders, so that missing weights are said before the first clip."""
    if prompt_layout:
        if not isinstance(predictor, LlmPredictor):
            raise UserError("--prompt-layout: this checkpoint reads no prompt")
        predictor.data.prompt_layout = prompt_layout
    print(f"{predictor.folder}: {predictor.coverage}")
    for name in predictor.made:
        encoder = predictor.encoder(name)
        if encoder is not None and encoder.coverage:
            print(f"{name}, {encoder.name}: {encoder.coverage}")


def chat(predictor: Predictor, clips: list[Clip], cfg: Config) -> None:
    """Answers questions about one clip, a line each, until there are no more."""
    if not isinstance(predictor, LlmPredictor):
        raise UserError("--chat: this checkpoint answers no questions")
    if len(clips) > 1:
        raise UserError(f"--chat: is about one clip, not {len(clips)}")
    if cfg.question is not None or cfg.out:
        raise UserError(f"--chat: takes no --{'out' if cfg.out else 'question'}")
    clip, values, missing = predictor.read(clips[0])
    turns: list[tuple[str, str]] = []
    print("a question a line, [emotion] for the label; Ctrl-D ends", flush=True)
    for question in filter(None, map(str.strip, sys.stdin)):
        sample = predictor.ask(clip, values, question, turns)
        result = predictor.answer([sample], question, {sample.id: missing})[0]
        print(line(result), flush=True)
        turns.append((question, result.get("answer", result["emotion"])))


def line(result: dict) -> str:
    """One result for the terminal."""
    if "error" in result:
        return f"{result['id']}: skipped: {result['error']}"
    gone = f"  (without {', '.join(result['missing'])})" if result["missing"] else ""
    if "strategy" in result:
        return f"{result['id']}: [{result['emotion']} -> {result['strategy']}] {result['answer']}{gone}"
    if "answer" in result:
        return f"{result['id']}: {result['answer']}{gone}"
    if "probabilities" not in result:
        return f"{result['id']}: {result['emotion']}  [score {result['score']:.2f}]{gone}"
    top = sorted(result["probabilities"].items(), key=lambda item: -item[1])[:3]
    return f"{result['id']}: {result['emotion']}  [{', '.join(f'{label} {p:.2f}' for label, p in top)}]{gone}"


if __name__ == "__main__":
    config.run(Config, main)
