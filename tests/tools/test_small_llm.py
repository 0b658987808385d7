"""A small language model made from a file of turns, as a user makes it."""

import pytest

from data.mesc import write_turns
from model.llm import Llama
from model.tokenizer import load_tokenizer
from tests.data.test_turns import turn
from tests.training import run
from tools import small_llm


def test_a_model_and_a_vocabulary_for_these_words(tmp_path, capsys):
    write_turns(tmp_path / "train.jsonl", [turn(n, 0, client="unfathomable sorrows") for n in range(5)])
    argv = [
        "--turns",
        tmp_path / "train.jsonl",
        "--out",
        tmp_path / "llm",
        "--hidden",
        32,
        "--layers",
        2,
        "--pieces",
        600,
    ]
    assert run(small_llm, argv) == 0
    llm, tokenizer = Llama.from_pretrained(tmp_path / "llm"), load_tokenizer(tmp_path / "llm")
    assert (llm.config.hidden_size, llm.config.num_hidden_layers, llm.config.attention_bias) == (32, 2, True)
    assert tokenizer.vocab_size <= llm.config.vocab_size
    assert len(tokenizer.encode("unfathomable sorrows", specials=())) <= 3
    assert run(small_llm, argv) == 2
    assert f"--out {tmp_path / 'llm'}: exists already" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides_the_weights(tmp_path, seed):
    write_turns(tmp_path / "train.jsonl", [turn(0, 0)])
    for name, other in (("a", 0), ("b", seed)):
        argv = [
            "--turns",
            tmp_path / "train.jsonl",
            "--out",
            tmp_path / name,
            "--hidden",
            16,
            "--layers",
            1,
            "--seed",
            other,
        ]
        assert run(small_llm, argv) == 0
    same = (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert same == (seed == 0)
