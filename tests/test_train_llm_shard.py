"""train_llm.py --shard: several processes, on one machine or two, train what one trains; their checkpoints fit any."""

import json
import os
import re
import shutil
import signal
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

import eval as score
import train_llm
from common import checkpoint, config, dist, optim, shard
from model.toy import make_toy_llm
from tests.conftest import FORK, end, run_ranks
from tests.test_train_llm import killed_at, stopped_by_a_mistake, train, wait_until
from tests.training import talking
from tools import export

pytestmark = pytest.mark.usefixtures("signals", "ranks")
TRAIN = ["--eval-every", 9, "--no-test"]
SHORT = ["--iters-per-epoch", 1, "--no-evaluate", "--no-test"]
KINDS = {
    "lora": ["--shard", "--lora-dropout", 0, "--accum", 2],
    "full": ["--shard", "grads", "--full", "--normalize", "--grad-checkpoint"],
}


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def argv(base, kind, world, out, *more):
    """Ten steps of eight clips, saved after the fifth and the last, and evaluated then on an odd number of batches."""
    plain = KINDS[kind] if world else [each for each in KINDS[kind] if each not in ("--shard", "grads")]
    batch = 8 // max(world, 1) // (2 if kind == "lora" else 1)
    return [*base.argv, "--epochs", 2, "--iters-per-epoch", 5, "--batch-size", batch, "--evaluate", "--eval-every", 1,
            "--eval-batch-size", 2, "--eval-limit", 5, "--test", "--out", out, *plain, *more]  # fmt: skip


def losses(out, name="loss"):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


@pytest.fixture(scope="module")
def base(merr, tmp_path_factory):
    """The data of the other tests, over a language model of two layers."""
    folder = tmp_path_factory.mktemp("base") / "llm"
    sentences = ["[INST] <video> </video> <feature> </feature> The person in video says: we really leave today."]
    make_toy_llm(folder, [*sentences, *(f"The brow is very tense, so {label}." for label in merr.labels)], 1, 32, 2)
    return SimpleNamespace(argv=[*merr.argv, "--llm", str(folder)], root=merr.root, labels=merr.labels)


@pytest.fixture(scope="module", params=list(KINDS))
def runs(request, base, tmp_path_factory):
    """The same run by one process as ever, and sharded over two; what the second printed."""
    root, kind = tmp_path_factory.mktemp(request.param), request.param
    assert run_ranks(1, train, argv(base, kind, 0, root / "one")) == [0]
    outputs = run_ranks(2, talking, train, argv(base, kind, 2, root / "two"))
    assert [code for code, _ in outputs] == [0, 0]
    assert outputs[1][1] == ""  # rank 0 alone prints
    return SimpleNamespace(kind=kind, one=root / "one", two=root / "two", said=outputs[0][1])


def tensors(folder):
    """All that a checkpoint holds of model and optimiser."""
    return {**checkpoint.read(folder), **checkpoint.read(folder, checkpoint.OPTIMIZER)}


def test_two_ranks_train_what_one_process_trains(runs):
    assert len(losses(runs.one)) == 10
    assert losses(runs.two) == pytest.approx(losses(runs.one), abs=1e-5)
    assert losses(runs.two, "grad_norm") == pytest.approx(losses(runs.one, "grad_norm"), abs=1e-4)
    for name in ("valid/loss", "valid/accuracy", "valid/invalid"):
        assert len(losses(runs.two, name)) == 2
        assert losses(runs.two, name) == pytest.approx(losses(runs.one, name), abs=1e-5), name
    one, two = (tensors(out / "checkpoints" / "last") for out in (runs.one, runs.two))
    assert one.keys() == two.keys()
    for name, value in one.items():
        # the state of Adam divides by gradients of next to nothing
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-3)
    one, two = (json.loads((out / "results.json").read_text())["test"] for out in (runs.one, runs.two))
    assert one["score"]["clips"] == 9
    for way in ("score", "generate"):
        assert two[way]["confusion"] == one[way]["confusion"]
    assert "batch 4 x 2 processes x 1" in runs.said or "batch 2 x 2 processes x 2" in runs.said


def test_a_sharded_checkpoint_is_files_of_safetensors_and_text(runs):
    folder = runs.two / "checkpoints" / "epoch_002"
    names = {path.name for path in folder.iterdir()}
    assert names == {"model", "optimizer", "state.json", "llm_config.json", "tokenizer.model"}
    for part in ("model", "optimizer"):
        files = sorted((folder / part).iterdir())
        assert len(files) == 2
        rows = [load_file(file) for file in files]  # nothing to unpickle
        shared = rows[0].keys() & rows[1].keys()
        assert len(shared) > 5  # each rank holds rows of them
        assert sum(sum(value.nbytes for value in each.values()) for each in rows) == sum(
            value.nbytes for value in checkpoint.read(folder, f"{part}.safetensors").values()
        )
    assert sorted(path.name for path in (runs.two / "checkpoints").iterdir()) == ["epoch_001", "epoch_002", "last"]


def resumed(arguments):
    """A run, and what it held, put together again, as it went on."""
    whole, begin = {}, train_llm.begin

    def looking(cfg, mllm, optimizer, *rest):
        progress = begin(cfg, mllm, optimizer, *rest)
        state = checkpoint.trainable_state(mllm) | optim.state_tensors(mllm, optimizer)
        whole.update({name: shard.whole(value).clone() for name, value in state.items()})
        return progress

    train_llm.begin = looking
    return talking(train, arguments), whole


@pytest.mark.parametrize(
    ("runs", "world", "more"),
    [(kind, 1, more) for kind in KINDS for more in ([], ["--shard", "none"])] + [("lora", 4, [])],
    indirect=["runs"],
)
def test_a_checkpoint_of_two_ranks_resumes_on_any_number(base, runs, ranks, tmp_path, world, more):
    out = tmp_path / "run"
    shutil.copytree(runs.two, out, symlinks=True)
    middle = out / "checkpoints" / "epoch_001"
    saved = tensors(middle)
    batch = ["--batch-size", 8 // world // (2 if runs.kind == "lora" else 1)]
    results = ranks(world, resumed, [*base.argv, "--resume", middle, *batch, *TRAIN, *more])
    for (code, _), found in results:
        assert code == 0
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    said = results[0][0][1]
    assert f"world was 2, is {world}: results will differ in the last digits\n" in said
    assert losses(out) == pytest.approx(losses(runs.one), abs=1e-5)  # of ten steps, the last five new
    last = out / "checkpoints" / "last"
    assert (last / "model.safetensors").is_file() == bool(more)
    assert len(list(last.glob("model/*"))) == (0 if more else world)


@pytest.mark.parametrize("runs", ["lora"], indirect=True)
def test_a_checkpoint_of_one_process_goes_on_sharded(base, runs, ranks, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs.one, out, symlinks=True)
    saved = tensors(out / "checkpoints" / "epoch_001")
    again = argv(base, runs.kind, 2, out, *TRAIN, "--resume", out / "checkpoints" / "epoch_001")
    for (code, _), found in ranks(2, resumed, again):
        assert code == 0
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert losses(out) == pytest.approx(losses(runs.one), abs=1e-5)
    assert (out / "checkpoints" / "last" / "model").is_dir()


@pytest.mark.parametrize("stage", [3, 2])
def test_deepspeeds_stages_are_shard(base, ranks, tmp_path, stage):
    """Two processes; connectors have a rate of their own, which sharded parameters keep."""
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, "offload_param": {"device": "none"}}}))
    short = [*base.argv, *SHORT, "--epochs", 2, "--batch-size", 2, "--mm_projector_lr", 1e-2, "--out"]
    asked = {"a": ["--shard", {3: "full", 2: "grads"}[stage]], "b": ["--deepspeed", file], "c": []}
    for name, more in asked.items():
        results = ranks(2, talking, train, [*short, tmp_path / name, *more])
        assert [code for code, _ in results] == [0, 0]
        assert ("stage 3 -> --shard full" in results[0][1]) == (name == "b" and stage == 3)
    a, b, c = (tensors(tmp_path / name / "checkpoints/last") for name in asked)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == b.keys() == c.keys()
    for name in a:
        torch.testing.assert_close(b[name], c[name], atol=1e-5, rtol=1e-5)
    assert (tmp_path / "b/checkpoints/last/model").is_dir()


def whole(folder, out):
    """A copy of a sharded checkpoint as one process would have written it."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("model", "optimizer"))
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        save_file(dict(checkpoint.read(folder, file)), out / file)
    return out


def scores(ckpt, out, *more):
    score.main(config.load(score.Config, [*map(str, ["--ckpt", *ckpt, "--out", out, "--device", "cpu", *more])]))
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads((out / "metrics.json").read_text()), records


def test_eval_and_export_read_the_parts(runs, tmp_path, capsys):
    folder = (runs.two / "checkpoints" / "last").resolve()
    copy = whole(folder, tmp_path / "copy")
    told, records = scores([runs.two], tmp_path / "parts")  # found from the run folder
    assert f"{folder}: " in capsys.readouterr().out
    assert records == scores([copy], tmp_path / "whole")[1]
    ours, of_one = scores([runs.one], tmp_path / "one")
    assert ours["accuracy"] == told["accuracy"]
    for one, two in zip(of_one, records, strict=True):
        assert two["probabilities"] == pytest.approx(one["probabilities"], abs=1e-4)
    mean = scores([folder, copy], tmp_path / "mean", "--combine", "weights")[1]
    for one, two in zip(records, mean, strict=True):
        assert two["probabilities"] == pytest.approx(one["probabilities"], abs=1e-6)
    form = "peft" if runs.kind == "lora" else "huggingface"
    for source, name in ((folder, "parts"), (copy, "whole")):
        given = ["--ckpt", str(source), "--format", form, "--out", str(tmp_path / form / name)]
        export.main(config.load(export.Config, given))
    for file in (tmp_path / form / "whole").glob("*.safetensors"):
        assert (tmp_path / form / "parts" / file.name).read_bytes() == file.read_bytes()


def test_a_next_stage_starts_from_the_parts(base, runs, ranks, tmp_path):
    more = ["--epochs", 1, "--iters-per-epoch", 1, "--lr", "1e-9", "--min-lr", "1e-9", "--ckpt", runs.two, *TRAIN]
    [(code, said)] = ranks(1, talking, train, argv(base, runs.kind, 0, tmp_path / "next", *more))
    assert code == 0
    assert f"weights of {(runs.two / 'checkpoints' / 'last').resolve()}: " in said
    first, second = (checkpoint.read(out / "checkpoints" / "last") for out in (runs.two, tmp_path / "next"))
    for name, value in first.items():  # one step at a learning rate of next to nothing
        torch.testing.assert_close(second[name], value, atol=1e-7, rtol=1e-6)


def test_a_part_that_is_gone_or_damaged(runs, ranks, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs.two, out, symlinks=True)
    folder = (out / "checkpoints" / "last").resolve() / "model"
    first, second = sorted(folder.iterdir())

    def line():
        (tmp_path / "said0").unlink(missing_ok=True)
        assert ranks(1, stopped_by_a_mistake, ["--resume", "--out", out], str(tmp_path / "said")) == [2]
        return (tmp_path / "said0").read_text().splitlines()[-1].removeprefix("train_llm.py: error: ")

    kept = first.read_bytes()
    first.unlink()
    assert line().startswith(f"{folder}: rows 0 to ")
    first.write_bytes(kept)
    second.write_bytes(second.read_bytes()[:30])
    assert line().startswith(f"{second}: not a readable safetensors file (")
    second.unlink()
    wrong = line()
    assert wrong.startswith(f"{folder}: ")
    assert re.search(r"tensors of the wrong shape: | missing: ", wrong)


# ---- saving


@pytest.mark.parametrize(("call", "number", "saved"), [("_fill", 2, 1), ("_sync", 9, 1), ("_link", 2, 2)])
def test_a_kill_inside_a_save_costs_at_most_that_save(base, ranks, tmp_path, call, number, saved):
    out = tmp_path / "run"
    assert killed_at(call, number, argv(base, "full", 1, out, *SHORT)) == -signal.SIGKILL
    left = checkpoint.newest(out / "checkpoints")
    assert checkpoint.read_state(left)["step"] == saved
    assert {len(value) for value in checkpoint.read(left).values()} > {32}
    assert len(list((out / "checkpoints").glob(".tmp-parts-*"))) == 1  # as far as it came
    assert ranks(1, train, argv(base, "full", 1, out, *SHORT, "--resume")) == [0]
    assert checkpoint.read_state(out / "checkpoints" / "last")["step"] == 2
    assert not list((out / "checkpoints").glob(".tmp-*"))


def full_disk(arguments, said):
    """A run whose second rank finds the disk full when it writes its part of the second checkpoint."""
    write, calls = torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data, []

    def failing(self, *args):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 4:
            raise OSError(28, os.strerror(28))
        return write(self, *args)

    torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data = failing
    return stopped_by_a_mistake(arguments, said)


def test_a_full_disk_of_one_rank_stops_all_and_keeps_what_was_saved(base, ranks, tmp_path):
    out = tmp_path / "run"
    assert ranks(2, full_disk, argv(base, "full", 2, out, *SHORT), str(tmp_path / "said")) == [2, 2]
    line = f"cannot save {out}/checkpoints/epoch_002: no space left on the disk; earlier checkpoints are kept\n"
    assert all(line in (tmp_path / f"said{rank}").read_text() for rank in (0, 1))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["epoch_001", "last"]


def blind(arguments, said):
    """A run whose second rank has a disk of its own."""
    seen = checkpoint.Path.is_dir
    if os.environ["RANK"] == "1":
        checkpoint.Path.is_dir = lambda path: False if ".tmp-parts" in path.name else seen(path)
    return stopped_by_a_mistake(arguments, said)


def test_a_disk_that_ranks_do_not_share_is_named(base, ranks, tmp_path):
    out = tmp_path / "run"
    assert ranks(2, blind, argv(base, "full", 2, out, *SHORT), str(tmp_path / "said")) == [2, 2]
    root = out / "checkpoints"
    line = (f"cannot save {root}/epoch_001: 1 of 2 ranks do not see {root}, which must be on a shared disk; earlier "
            "checkpoints are kept\n")  # fmt: skip
    assert all(line in (tmp_path / f"said{rank}").read_text() for rank in (0, 1))


# ---- two machines


def node(arguments, port, output):
    """torchrun's agent on one of two nodes, with one process that is forked from it."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setsid()
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    both = {"min_nodes": 2, "max_nodes": 2, "nproc_per_node": 1, "max_restarts": 0, "start_method": "fork"}
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": f"localhost:{port}", "run_id": "two"}
    elastic_launch(LaunchConfig(**both, **meeting), process)(arguments)


def process(arguments):
    dist.LAUNCHED, dist.PARENT = True, os.getppid()  # read at import, which was before the fork
    assert train(arguments) == 0


@pytest.mark.parametrize("runs", ["full"], indirect=True)
def test_two_nodes_of_one_process_train_what_one_process_trains(base, runs, tmp_path):
    out = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [tmp_path / name for name in ("first", "second")]
    argument = argv(base, runs.kind, 2, out, *TRAIN)
    nodes = [FORK.Process(target=node, args=(argument, port, output)) for output in outputs]
    try:
        for each in nodes:
            each.start()
        told = lambda: "\n".join(output.read_text() for output in outputs)  # noqa: E731
        wait_until(lambda: not any(each.is_alive() for each in nodes), 60, told)
    finally:
        for each in nodes:
            end(each)
    assert [each.exitcode for each in nodes] == [0, 0], told()
    assert losses(out) == pytest.approx(losses(runs.one), abs=1e-5)
    assert len(list((out / "checkpoints" / "last" / "model").iterdir())) == 2


# ---- a user's mistakes


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--offload"], "--offload: needs --shard"),
        (["--shard", "--offload"], "--offload: there is no GPU here whose memory it could spare"),
        (["--shard", "--fp16"], "--shard: not in fp16, use --precision bf16"),
        (["--shard", "grads", "--cuda-graphs"],
         "--shard: layers are gathered at every step, so --cuda-graphs cannot replay it"),
        (["--shard", "--compile-steps"],
         "--shard: layers are gathered at every step, so --compile-steps cannot compile it"),
        (["--shard", "grads", "--temperature", "0.5"],
         "--shard: all processes must choose the same tokens, so --temperature must be 0"),
        (["--shard", "half"], "--shard: 'half' is not one of grads, full"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_said_in_one_line(merr, tmp_path, capsys, more, line):
    assert train([*merr.argv, *more, "--out", tmp_path / "run"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"train_llm.py: error: {line}"
    assert not (tmp_path / "run").exists()
