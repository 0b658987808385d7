"""A small random Qwen2 with a vocabulary fitted to dialogues, to be trained from scratch where there are no weights.

$ python -m tools.small_llm --turns datasets/mesc/train.jsonl --out weights/small_qwen2
"""

from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, opt, run
from data.mesc import read_turns
from data.support import format_target
from model.toy import make_toy_qwen2


@dataclass
class Config:
    turns: str = opt("datasets/mesc/train.jsonl", "training turns, whose words the vocabulary is fitted to", "--turns")
    out: str = opt("weights/small_qwen2", "folder for the model and its tokenizer", "--out")
    pieces: int = opt(3000, "size of the vocabulary", "--pieces")
    hidden: int = opt(96, "width", "--hidden")
    layers: int = opt(2, "layers", "--layers")
    seed: int = opt(0, "seed of the weights", "--seed")


def main(cfg: Config) -> None:
    if Path(cfg.out).exists():
        raise UserError(f"--out {cfg.out}: exists already")
    turns, listing = read_turns(cfg.turns)
    print(listing)
    texts = [f"{turn.client} {format_target(turn)}" for turn in turns]
    make_toy_qwen2(Path(cfg.out), texts, cfg.seed, cfg.hidden, cfg.layers, cfg.pieces)
    print(f"{cfg.out}: {cfg.layers} layers of width {cfg.hidden}, at most {cfg.pieces:,} pieces")


if __name__ == "__main__":
    run(Config, main)
