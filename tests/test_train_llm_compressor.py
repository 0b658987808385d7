"""train_llm.py --reconstruct: the history compressor learns alone, in two stages, and training goes on with it."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
import torch._dynamo  # DDP loads it: a second that no forked rank spends, once it is here
import torch.utils.tensorboard
from safetensors.torch import load_file, save_file

import eval as score
import predict
import train_llm
from common import checkpoint
from data.mesc import Turn, Utterance, write_turns
from model.mamba import Mamba, MambaConfig
from tests.qwen import make_qwen
from tests.training import error, run, weights
from tools import export

SAID = ["nobody listens", "she is late", "you are angry", "a happy face", "the video", "again", "who is she"]
# 60 optimiser steps over the 12 utterances of six dialogues
STAGE1 = ["--reconstruct", "utterances", "--lr", "1e-2", "--epochs", 4, "--iters-per-epoch", 15, "--batch-size", 4]


def turns(count):
    """Dialogues of two turns, and all that was said before the second; "okay" is in each of them."""
    for i in range(count):
        said = [Utterance("client", "sadness", f"{SAID[i]} {i}"), Utterance("therapist", "neutral", SAID[i - 1])]
        said = [*said, Utterance("client", "neutral", "okay")]
        for place in (0, 3):
            yield Turn(
                f"{i}_{place}", str(i), None, "work", "a new boss", "again", "the face", "joy", "neutral", "others",
                history=said[:place],
            )  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A language model, a Mamba that knows another tokenizer, seven dialogues, and the command line of it all."""
    root = tmp_path_factory.mktemp("toy")
    make_qwen(root / "qwen")
    torch.manual_seed(3)
    mamba = Mamba(MambaConfig(40, 32, 2, 64, 8, 2))
    (root / "mamba").mkdir()
    save_file(
        {f"backbone.{name}": t.contiguous() for name, t in mamba.state_dict().items()},
        root / "mamba" / "model.safetensors",
    )
    (root / "mamba" / "config.json").write_text(json.dumps(mamba.config.to_json()))
    write_turns(root / "train.jsonl", turns(7))
    argv = [
        "--llm", root / "qwen", "--mamba-compressor", root / "mamba", "--lora-targets", "[]", "--model.features", "{}",
        "--visual", "none", "--no-grad-checkpoint", "--data-root", root / "train.jsonl", "--schedule", "constant",
        "--warmup-steps", 0, "--weight-decay", 0, "--metric", "loss", "--device", "cpu", "--num-workers", 0,
        "--log-every", 1,
    ]  # fmt: skip
    return SimpleNamespace(root=root, argv=list(map(str, argv)))


@pytest.fixture(scope="module")
def stage1(toy, tmp_path_factory):
    """A run that knows its utterances by heart, and what it printed; it is tested on all of them."""
    out = tmp_path_factory.mktemp("stage1") / "run"
    argv = [*toy.argv, *STAGE1, "--evaluate", "--eval-every", 2, "--save-best", "--test", "--test-file",
            toy.root / "train.jsonl", "--valid-share", 0.15, "--out", out]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run(train_llm, argv) == 0
    return SimpleNamespace(out=out, said=said.getvalue())


def logged(out, name):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def tensors(out, file=checkpoint.MODEL):
    return load_file(out / "checkpoints" / "last" / file)


def test_ranks_share_the_histories(toy, ranks, tmp_path):
    argv = [*toy.argv, *STAGE1, "--epochs", 1, "--iters-per-epoch", 5, "--evaluate", "--eval-every", 1,
            "--valid-share", 0.3]  # fmt: skip
    assert ranks(1, run, train_llm, [*argv, "--out", tmp_path / "one"]) == [0]
    assert ranks(2, run, train_llm, [*argv, "--batch-size", 2, "--out", tmp_path / "two"]) == [0, 0]
    names = ("loss", *(f"valid/{kind}{name}" for kind in ("", "shuffled_") for name in ("loss", "token_accuracy")))
    for name in names:
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), abs=1e-4), name
    assert logged(tmp_path / "one", "valid/loss") != logged(tmp_path / "one", "valid/shuffled_loss")


def test_nothing_but_the_compressor_trains(stage1):
    held = tensors(stage1.out)
    assert all(name.startswith("projections.history.") for name in held)
    assert {name.split(".")[2] for name in held} == {"mamba", "memory_projection"}
    assert f"; {sum(t.numel() for t in held.values()):,} parameters train;" in stage1.said
    moved = tensors(stage1.out, checkpoint.OPTIMIZER)
    assert {name.partition(".")[2] for name in moved} == set(held)
    assert all(t.any() for name, t in moved.items() if name.startswith("exp_avg."))


def test_the_memory_is_read(stage1):
    """A random language model says little; what it can say it says of the memory that it sees."""
    test = json.loads((stage1.out / "results.json").read_text())["test"]
    assert test["loss"] < logged(stage1.out, "loss")[0] - 0.3
    assert test["loss"] < test["shuffled_loss"] - 0.1
    assert f"test: loss {test['loss']:.4f}, token_accuracy {test['token_accuracy']:.4f}, shuffled_" in stage1.said


def test_validation_is_on_dialogues_held_out(stage1):
    assert "valid: 2 turns held out by dialogue (seed 42)\n" in stage1.said
    assert "train: 13 utterances; of more than 512 tokens: 0 cut, 0 left out\n" in stage1.said
    assert "valid: 2 utterances; of more than 512 tokens: 0 cut, 0 left out\n" in stage1.said  # "okay" is in train
    losses = logged(stage1.out, "valid/loss")
    assert len(losses) == 2
    state = checkpoint.read_state(checkpoint.resolve(stage1.out, "best"))
    assert state["best"]["value"] == min(losses)


def test_a_run_resumes_exactly(toy, stage1, tmp_path):
    out = tmp_path / "again"
    assert run(train_llm, ["--resume", stage1.out / "checkpoints" / "epoch_003", "--out", out, "--no-test"]) == 0
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        whole = stage1.out / "checkpoints" / "epoch_004" / file
        assert (out / "checkpoints" / "epoch_004" / file).read_bytes() == whole.read_bytes()


def test_each_stage_starts_from_the_last(toy, stage1, tmp_path, capsys):
    still = ["--lr", 0, "--epochs", 1, "--iters-per-epoch", 2, "--valid-share", 0]
    second = [*toy.argv, "--reconstruct", "dialogues", "--ckpt", stage1.out, *still, "--out", tmp_path / "stage2"]
    assert run(train_llm, second) == 0
    said = capsys.readouterr().out
    folder = checkpoint.resolve(stage1.out, "best")
    count = len(tensors(stage1.out))
    assert f"weights of {folder}: {count}/{count} projection tensors\n" in said
    assert "train: 7 dialogues; of more than 512 tokens: 0 cut, 0 left out\n" in said
    assert weights(tmp_path / "stage2") == weights(stage1.out, "best")
    tune = [*toy.argv, "--lora-targets", "q_proj", "--mamba-compressor", tmp_path / "stage2", *still]
    assert run(train_llm, [*tune, "--out", tmp_path / "sft"]) == 0
    learnt, tuned = tensors(tmp_path / "stage2"), tensors(tmp_path / "sft")
    assert any("lora_" in name for name in tuned)
    for name, value in learnt.items():
        assert torch.equal(tuned[name], value), name


def test_it_answers_nothing(stage1, toy, capsys):
    folder = checkpoint.resolve(stage1.out, "best")
    line = f"{folder}: a history compressor alone, which answers nothing; train_llm.py --mamba-compressor {folder} "
    for script, argv in ((score, []), (predict, ["--input", toy.root / "train.jsonl"])):
        assert error(script, ["--ckpt", stage1.out, *argv], capsys) == f"{line}goes on with it"
    argv = ["--ckpt", stage1.out, "--format", "peft", "--out", toy.root / "peft"]
    assert error(export, argv, capsys) == f"{folder}: its language model was not trained, so it has no adapters"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--data-root", "DIR"], "--data-root DIR is no file of turns (.jsonl)"),
        (["--mamba-compressor", "none"], "needs --mamba-compressor"),
        (["--lora-targets", "q_proj"], "trains the compressor alone, so not with --lora-targets"),
        (["--full", "--vision-tower", "framestats"], "trains the compressor alone, so not with --full, --vision-tower"),
        (["--data.curriculum", "both"], "--data.curriculum: not read by turns of dialogues"),
        (["--data.enable-augmentation"], "--data.enable-augmentation: not for turns of dialogues"),
        (["--metric", "accuracy"], "--metric accuracy: not a score of these data (loss, token_accuracy)"),
        (["--fast"], "--fast: not with --reconstruct"),
        (["--memory-tokens", 3], "no turn has a history of at most 3 tokens"),
        (["--evaluate", "--valid-share", 0.01], "valid: 1 dialogues; the control needs two"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(toy, tmp_path, capsys, monkeypatch, argv, line):
    monkeypatch.chdir(tmp_path)
    kind = "dialogues" if "--evaluate" in argv else "utterances"
    assert line in refusal([*toy.argv, "--reconstruct", kind, *argv, "--out", tmp_path / "run"], capsys)


def refusal(argv, capsys):
    capsys.readouterr()
    assert run(train_llm, argv) == 2
    lines = [each for each in capsys.readouterr().err.splitlines() if not each.startswith("warning: ")]
    assert len(lines) == 1, lines
    return lines[0]
