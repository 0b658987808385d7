"""train_llm.py, eval.py and predict.py on turns of dialogues: stopped and resumed, on two processes, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
import predict
import train_llm
from common import checkpoint
from data.mesc import memory_text, read_turns, write_turns
from data.mock_support import make_support
from data.support import FIELDS, PromptConfig, parse_answer, segments
from model.tokenizer import load_tokenizer
from model.toy import make_toy_mamba, make_toy_qwen2
from tests.conftest import FORK
from tests.serving import request, served
from tests.training import error, killed_saving, run, stopped_inside, weights

ROOT = Path(train_llm.__file__).parent
EMOTIONS = "anger,sadness,joy,fear,neutral"
STRATEGIES = "restatement,self-disclosure,approval,open question"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """24 turns to train on, 6 to choose by, 6 to test; a tiny Qwen2 and a tiny Mamba."""
    root = tmp_path_factory.mktemp("support")
    make_support(root, 24, 6, 6, seed=1, size=32)
    turns = read_turns(root / "train.jsonl")[0]
    pieces = [piece for turn in turns for piece in segments(turn, PromptConfig(), ()) if isinstance(piece, str)]
    make_toy_qwen2(root / "base", [*pieces, *map(memory_text, turns)], hidden=32, layers=2)
    make_toy_mamba(root / "mamba", load_tokenizer(root / "base").vocab_size + 1, width=16)
    return root


@pytest.fixture(scope="module")
def small(root):
    """Six steps an epoch of four turns, every stream in use."""
    return [
        "--data-root", root / "train.jsonl", "--valid-file", root / "val.jsonl", "--test-file", root / "test.jsonl",
        "--llm", root / "base", "--mamba-compressor", root / "mamba", "--full", "--model.normalize",
        "--no-grad-checkpoint", "--max-len", 900, "--vision-tower", "framestats", "--num-frames", 4,
        "--model.towers.patches", 16, "--model.towers.vision-width", 12, "--mm-projector-type", "mlp2x_gelu",
        "--audio-tower", "logmel",
        "--model.towers.audio-tokens", 1, "--model.towers.audio-width", 504, "--answer-room", 64, "--k-turn-history", 1,
        "--emotions", EMOTIONS, "--strategies", STRATEGIES, "--lr", 2e-3, "--warmup-steps", 2, "--warmup-lr", 0,
        "--batch-size", 4, "--num-workers", 0, "--device", "cpu", "--log-every", 1,
    ]  # fmt: skip


def train(argv):
    return run(train_llm, argv)


@pytest.fixture(scope="module")
def unbroken(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert train([*small, "--epochs", 3, "--out", out]) == 0
    return out


def test_a_stop_and_a_kill_resume_to_the_same_weights(small, unbroken, tmp_path):
    argv = [*small, "--epochs", 3, "--out", tmp_path / "out"]
    stop = FORK.Process(target=stopped_inside, args=(train_llm, argv, 4))
    stop.start()
    stop.join(100)
    assert (tmp_path / "out" / "checkpoints" / "step_000004").is_dir()
    killed_saving(train_llm, [*argv, "--resume"], "save_file", 2)
    assert train([*argv, "--resume"]) == 0
    assert weights(tmp_path / "out") == weights(unbroken)
    tensors = load_file(unbroken / "checkpoints" / "last" / "model.safetensors")
    assert {name.split(".")[1] for name in tensors if name.startswith("projections.")} == {"video", "audio", "history"}


def test_two_processes_take_the_steps_of_one(small, ranks, tmp_path, unbroken):
    assert ranks(2, train, [*small, "--batch-size", 2, "--epochs", 3, "--out", tmp_path / "out"]) == [0, 0]
    one, two = (load_file(out / "checkpoints" / "last" / "model.safetensors") for out in (unbroken, tmp_path / "out"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=name)


def test_batches_by_length_take_the_same_turns(small, tmp_path, unbroken):
    assert train([*small, "--tokens-per-batch", 700, "--epochs", 3, "--out", tmp_path / "out"]) == 0
    one, two = (load_file(out / "checkpoints" / "last" / "model.safetensors") for out in (unbroken, tmp_path / "out"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=name)


@pytest.fixture(scope="module")
def finished(small, root, tmp_path_factory):
    """A run that has chosen by its scores and read its test turns."""
    out = tmp_path_factory.mktemp("finished") / "out"
    choose = [
        "--evaluate",
        "--eval-every",
        1,
        "--save-best",
        "--metric",
        "client_emotion",
        "--test",
        "--max-new-tokens",
        6,
    ]
    assert train([*small, *choose, "--epochs", 2, "--out", out]) == 0
    return out


def test_what_a_run_writes(finished):
    results = json.loads((finished / "results.json").read_text())
    state = checkpoint.read_state(checkpoint.resolve(finished))
    assert results["best"]["metric"] == "client_emotion"
    tests = results["test"]
    assert {"all", "without video", "without audio", "without history", "without text"} <= set(tests)
    assert tests["all"]["records"] == 6
    assert {name for name, field in tests["all"]["fields"].items() if field["majority"]} == set(FIELDS) - {"response"}
    assert state["features"]["video"]["encoder"] == "framestats"
    assert state["labels"]["strategy"] == STRATEGIES.split(",")
    assert state["config"]["model"]["visual"] is None


@pytest.mark.parametrize("decode", ["score", "generate"])
def test_evaluation_again(finished, tmp_path, decode, capsys):
    argv = ["--ckpt", finished, "--decode", decode, "--max-new-tokens", 6, "--out", tmp_path]
    assert run(eval_script, argv) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    told = json.loads((finished / "results.json").read_text())["test"]["all"]
    records = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert found["bench"] == "support"
    if decode == "score":
        assert {name: field["accuracy"] for name, field in found["fields"].items()} == {
            name: field["accuracy"] for name, field in told["fields"].items()
        }
        assert (tmp_path / "strategy.png").is_file()
    else:
        assert found["unparsable"] == 6
        assert "6 of 6 answers lack a field: they are wrong there" in capsys.readouterr().out


def test_evaluation_of_some_modalities(finished, tmp_path, capsys):
    assert (
        run(
            eval_script,
            ["--ckpt", finished, "--modalities", "text", "--limit", 2, "--out", tmp_path, "--max-new-tokens", 2],
        )
        == 0
    )
    assert "6 turns (text alone), given text" in capsys.readouterr().out
    record = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert "<video>" not in record["prompt"]


@pytest.mark.parametrize("given", ["--fold 1", "--judge lexical", "--truth true.csv", "--features-root x"])
def test_evaluation_refuses_what_it_would_not_read(finished, given, capsys):
    option, value = given.split()
    line = error(eval_script, ["--ckpt", finished, option, value], capsys)
    assert line == f"{option}: not read by the benchmark support"


def test_predictions_are_those_of_the_evaluation(finished, root, tmp_path):
    run(eval_script, ["--ckpt", finished, "--max-new-tokens", 6, "--out", tmp_path])
    records = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("Utterance", "Emotion", "Strategy", "get_emotion_user_most_recent"):
            del row[key]
    unanswered = root / "unanswered.jsonl"
    unanswered.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--ckpt", finished, "--input", unanswered, "--max-new-tokens", 6, "--out", tmp_path / "said.jsonl"]
    assert run(predict, argv) == 0
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    for record, result in zip(records, said, strict=True):
        fields = parse_answer(record["answer"])
        assert {name: result[name] for name in FIELDS} == fields
        assert result["emotion"] == fields["client_emotion"]
        assert result["probabilities"] == pytest.approx(record["probabilities"]["client_emotion"], abs=1e-5)
        assert result["confidence"] == max(result["probabilities"].values())


def test_one_clip_after_what_was_said_before(finished, root, tmp_path):
    predictor = predict.load(finished)
    clip = next((root / "video_data").glob("*.mp4"))
    result = predictor(clip, text="I lost my keys.", turns=[("I am here.", "Welcome.")])
    assert result["available_modalities"] == ["video", "audio", "history", "text"]
    assert set(result["probabilities"]) == set(EMOTIONS.split(","))
    assert set(result["strategies"]) == set(STRATEGIES.split(","))
    with served(predictor, tmp_path, root=root / "video_data") as server:
        asked = {"video_path": clip.name, "text": "I lost my keys."}
        status, answer, _ = request(server.port, "POST", "/process_video", asked)
    alone = predictor(clip, text="I lost my keys.")
    assert (status, answer["text"], answer["strategy"]) == (200, alone["answer"], alone["strategy"])
    assert answer["probabilities"] == pytest.approx(alone["probabilities"], abs=6e-5)
    words = predictor(text="I lost my keys.")
    assert set(words["missing"]) == {"video", "audio", "history"}
    with pytest.raises(predict.MediaError, match="nothing to go by"):
        predictor()
    with pytest.raises(predict.UserError, match="answers what a client says"):
        predictor(text="Hello.", question="[reason] Why?")


def changed(root, folder, change):
    """A copy of the turns, each record of train.jsonl changed, and a link to their clips."""
    folder.mkdir()
    shutil.copytree(root / "video_data", folder / "video_data", symlinks=True)
    for name in ("val", "test"):
        shutil.copy(root / f"{name}.jsonl", folder)
    lines = (root / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("".join(change(i, line) + "\n" for i, line in enumerate(lines)))
    return folder / "train.jsonl"


def test_a_bad_line_and_missing_clips(small, root, tmp_path, capsys):
    turns = changed(root, tmp_path / "data", lambda i, line: line[:40] if i == 7 else line)
    gone = read_turns(root / "train.jsonl")[0][0].clips
    for clip in gone:
        (tmp_path / "data" / "video_data" / clip).unlink()
    argv = [*small, "--data-root", turns, "--epochs", 1, "--out", tmp_path / "out"]
    assert train([*argv, "--max-bad", 0.1]) == 0
    said = capsys.readouterr().out
    assert f"{turns}: 24 listed, 23 used, 1 skipped (first: {turns}:8: not JSON" in said
    assert f"{len(gone)} of " in said
    assert "clips are not there, the first: " in said


def test_mistakes_are_one_line(small, root, tmp_path, capsys):
    def fails(*argv):
        capsys.readouterr()
        assert train([*small, "--out", tmp_path / "out", *argv]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        return line.removeprefix("train_llm.py: error: ")

    assert fails("--metric", "uar") == (
        "--metric uar: not a score of these data (accuracy, weighted_f1, macro_f1, client_emotion, therapist_emotion, "
        "strategy, loss)"
    )
    for option, value in (("--data.curriculum", "length"), ("--annotation-file", "x.txt"), ("--visual-encoder", "mae")):
        assert fails(option, value) == f"{option}: not read by turns of dialogues"
    augment = ["--data.enable-augmentation", "--data.augmentations"]
    assert fails(*augment, "noise=0.5,frame=0.5") == (
        f"--data.augmentations frame: not for turns of dialogues ({root / 'train.jsonl'})"
    )
    assert fails(*augment, "noise=2") == "--data.augmentations noise: 2 is no probability"
    assert fails("--image-path", tmp_path / "none").startswith(
        f"{root / 'train.jsonl'}: the folder of its clips was not"
    )
    assert fails("--model.towers.vision-width", 13) == (
        "framestats makes video (4, 16, 12), the model expects (4, 16, 13): --model.towers.vision-width 12"
    )
    assert fails("--mamba-compressor", tmp_path / "none").startswith(
        f"compressor weights '{tmp_path / 'none'}' not found"
    )
    assert f"{tmp_path / 'none.jsonl'} not found" in fails("--data-root", tmp_path / "none.jsonl")


def test_connectors_of_another_model_start_from_scratch(small, root, tmp_path, capsys):
    from safetensors.torch import save_file

    (tmp_path / "vl2").mkdir()
    tensors = {"model.mm_projector_a.weight": torch.ones(48, 504), "model.mm_projector_a.bias": torch.ones(48)}
    save_file(tensors, tmp_path / "vl2" / "model.safetensors")
    argv = [*small, "--pretrain-projectors-repo", tmp_path / "vl2", "--vision-tower", "none", "--epochs", 1]
    assert train([*argv, "--iters-per-epoch", 1, "--out", tmp_path / "out"]) == 0
    said = capsys.readouterr().out
    assert "is for a language model of width 48, not 32: the connector of audio starts from scratch" in said


def test_text_alone_needs_no_clips(small, root, tmp_path, capsys):
    write_turns(tmp_path / "train.jsonl", read_turns(root / "train.jsonl")[0])
    argv = [*small, "--data-root", tmp_path / "train.jsonl", "--vision-tower", "none", "--audio-tower", "none"]
    argv += ["--mamba-compressor", "none", "--modalities", "text,history", "--history-labels", "--no-context"]
    assert train([*argv, "--epochs", 1, "--iters-per-epoch", 2, "--out", tmp_path / "out"]) == 0
    assert "train: 24 turns (history " in capsys.readouterr().out


def test_a_dry_run_tells_the_published_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # neither weights nor data are here
    assert train(["--cfg", ROOT / "configs/multimood.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for line in (
        "language model Qwen/Qwen2-7B-Instruct: 7,615,616,512 parameters (its published shape",
        "  projection video               376,889,248",
        "  projection audio                15,604,736",
        "tokens a sample: 2850 embedded (video 1352, audio 1496, history 2) + ",
        "sample: a stand-in turn (the data are not here)",
    ):
        assert line in said
    assert train(["--cfg", ROOT / "configs/multimood_qlora.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    # r 64 on the seven linears of 28 layers; of the frozen compressor its projection alone
    hidden, inner, kv = 3584, 18944, 512
    shapes = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    assert f"  LoRA                           {28 * sum(64 * (a + b) for a, b in shapes):,}" in said
    assert f"  projection history               {1024 * hidden + hidden:,}" in said
    assert "2174 embedded (video 676, audio 1496, history 2)" in said
