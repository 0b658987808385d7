"""The history compressor's side of train_llm.py: what it is pretrained on, and how well its memory is read."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch

from common import config, dist
from common.config import UserError
from common.log import Logger
from common.shard import place
from data.mesc import read_turns
from data.prompts import Encode, Sample
from data.reconstruct import History, Reconstructions, histories
from data.turns import is_turns, load_turns
from evals import sizes
from evals.turns import STAND_IN, UNREAD, check_data, layout
from model.mllm import Mllm, pack
from model.tokenizer import Tokenizer


class ReconstructTask:
    """Utterances or whole dialogues of a file of turns, to be written out from the compressor's memory of them.

    The language model is frozen, without adapters. What it says of a history whose memory it sees stands beside what
    it says where it sees another's: as long as both are alike the memory is not read.
    """

    METRICS, LOWER = ("loss", "token_accuracy"), ("loss",)

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.kind = cfg, cfg.support.reconstruct
        cfg.model.features, cfg.model.visual = {}, None  # streams of Emotion-LLaMA
        self.found: dict[str, list[History]] = {}  # split -> histories
        self.valid: Reconstructions | None = None
        self.tested: Reconstructions | None = None

    def opens(self, device: torch.device, say: Callable[[str], None]) -> list[Callable[[], object]]:
        """What may go wrong before any connection is opened, each a call."""
        cfg = self.cfg

        def read() -> None:
            turns = load_turns(cfg.data, cfg.seed, cfg.evaluate, cfg.test, say)
            self.found = {split: histories(turns[split], self.kind) for split in turns}

        unread = partial(config.without, cfg, UNREAD, "turns of dialogues")
        return [self._check, unread, lambda: check_data(cfg.data, ()), read]

    def _check(self) -> None:
        """UserError where something else than the compressor would train, or there is none."""
        model, data = self.cfg.model, self.cfg.data
        towers = model.towers
        if not is_turns(data.data_root):
            raise UserError(f"--reconstruct {self.kind}: --data-root {data.data_root} is no file of turns (.jsonl)")
        if towers.mamba_compressor is None:
            raise UserError(f"--reconstruct {self.kind}: needs --mamba-compressor")
        others = {
            "full": model.full, "lora-targets": model.lora_targets, "vision-tower": towers.vision_tower,
            "audio-tower": towers.audio_tower, "freeze-mamba-compressor": towers.freeze_mamba_compressor,
            "shuffle-labels": data.shuffle_labels,
        }  # fmt: skip
        if given := [f"--{name}" for name, on in others.items() if on]:
            raise UserError(f"--reconstruct {self.kind}: trains the compressor alone, so not with {', '.join(given)}")

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return {}

    @property
    def labels(self) -> list[str]:
        return []

    def parts(self, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[Reconstructions]:
        """What is trained on."""
        train = self._made("train", self.found["train"], tokenizer, say)
        if not len(train):
            most = self.cfg.support.memory_tokens
            raise UserError(f"{self.cfg.data.data_root}: no turn has a history of at most {most} tokens")
        if self.found["valid"]:
            known = {tuple(said) for _, said in self.found["train"]}
            unseen = [(id, said) for id, said in self.found["valid"] if tuple(said) not in known]
            self.valid = self._made("valid", unseen, tokenizer, say)
        if self.cfg.test:
            self.tested = self._made("test", self.found["test"], tokenizer, say)
        return [train]

    def _made(
        self, split: str, found: list[History], tokenizer: Tokenizer, say: Callable[[str], None]
    ) -> Reconstructions:
        most = self.cfg.support.memory_tokens
        made = Reconstructions(found, self.kind, tokenizer.encode, most, layout(tokenizer))
        say(f"{split}: {len(made)} {self.kind}; of more than {most} tokens: {made.cut} cut, {made.lost} left out")
        if split != "train" and len(made) < 2:
            raise UserError(f"{split}: {len(made)} {self.kind}; the control needs two, to give one the other's memory")
        return made

    def fit(self, mllm: Mllm, say: Callable[[str], None]) -> None:
        """The compressor starts as it was loaded."""

    def follow(self, mllm: Mllm) -> None:
        """No history depends on the model."""

    def describe(self) -> dict[str, dict]:
        """There are no streams."""
        return {}

    def validate(
        self, mllm: Mllm, tokenizer: Tokenizer, here: dist.Ranks, amp: Callable, log: Logger, step: int
    ) -> dict[str, float]:
        """Scores of the histories held out, logged beside those with the memory of others; METRICS by their names."""
        assert self.valid is not None
        scores = score(mllm, self.valid, here, self.cfg.eval_batch_size, amp, self.cfg.eval_limit)
        log(step, **{f"valid/{name}": value for name, value in scores.items()})
        return scores

    def test(self, mllm: Mllm, tokenizer: Tokenizer, here: dist.Ranks, say: Callable[[str], None]) -> dict[str, float]:
        """The same scores of the test turns' histories."""
        assert self.tested is not None
        scores = score(mllm, self.tested, here, self.cfg.eval_batch_size)
        say(f"test: {', '.join(f'{name} {value:.4f}' for name, value in scores.items())}")
        return scores

    @staticmethod
    def prepare_fast(cfg: Any) -> NoReturn:
        """There is nothing small of it."""
        raise UserError("--fast: not with --reconstruct")

    def dry_run(self, say: Callable[[str], None]) -> None:
        """Prints what the run would cost."""
        cfg = self.cfg
        try:
            turn = read_turns(cfg.data.data_root, cfg.data.max_bad)[0][-1]
        except UserError:
            turn = None
        source = f"turn {turn.id}" if turn else "a stand-in turn (the data are not here)"
        found = histories([turn or STAND_IN], self.kind)[:1]

        def sample(encode: Encode) -> Sample:
            return Reconstructions(found, self.kind, encode, cfg.support.memory_tokens).samples[0]

        sizes.report(cfg.model, cfg.batch_size, sample, source, say)


def score(
    mllm: Mllm, data: Reconstructions, here: dist.Ranks, batch_size: int,
    amp: Callable[[], AbstractContextManager] = nullcontext, limit: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Mean cross entropy of an answer token in nats, and the share that the model finds likeliest after those before.

    "shuffled_" are the same where each history is asked for with another's memory. The ranks share the work.
    """
    was_training = mllm.training
    mllm.eval()
    mine = range(here.rank, min(limit or len(data), len(data)), here.world)
    scores: dict[str, float] = {}
    for prefix, each in (("", data), ("shuffled_", data.shuffled())):
        loss, hits, tokens = 0.0, 0.0, 0.0
        for at in range(0, len(mine), batch_size):
            batch = pack([each.sample(i) for i in mine[at : at + batch_size]], mllm.cfg).to(place(mllm))
            with amp():
                found = mllm.tally(batch)
            loss, hits, tokens = loss + float(found[0]), hits + float(found[1]), tokens + batch.targets
        loss, hits, tokens = dist.all_sum(loss, hits, tokens, device=here.device)
        scores |= {f"{prefix}loss": loss / tokens, f"{prefix}token_accuracy": hits / tokens}
    mllm.train(was_training)
    return scores
