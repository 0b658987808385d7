import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from common import checkpoint, dist
from common.config import UserError


class Net(nn.Module):
    """Every kind of tensor that a checkpoint holds (LoRA, projection, other, a buffer) and two that it leaves out."""

    def __init__(self, value):
        super().__init__()
        self.lora_A = nn.Parameter(torch.full((2, 3), value))
        self.projections = nn.ModuleDict({"face": nn.Linear(2, 2)})
        self.head = nn.Parameter(torch.full((3, 2), value).t())  # not contiguous
        self.frozen = nn.Parameter(torch.full((4,), value), requires_grad=False)
        self.register_buffer("mean", torch.full((2,), value))
        self.register_buffer("cache", torch.full((2,), value), persistent=False)


TENSORS = {"lora_A", "projections.face.weight", "projections.face.bias", "head", "mean"}


def save(root, name, step, best=False, keep=0, **state):
    """Saves a checkpoint whose every value is its step."""
    module = Net(float(step))
    nn.init.constant_(module.projections["face"].weight, float(step))
    nn.init.constant_(module.projections["face"].bias, float(step))
    optimizer = {"exp_avg.head": torch.full((3, 2), float(step)).t()}
    return checkpoint.save(
        root,
        name,
        module,
        optimizer,
        {"step": step, **state},
        {"tokenizer": b"abc"},
        ("last", "best") if best else ("last",),
        keep,
    )


def step_of(folder):
    """The step of a checkpoint, once all that it holds is found whole and of that step."""
    step = checkpoint.read_state(folder)["step"]
    module = Net(-1.0)
    checkpoint.load_model(module, folder)
    values = list(checkpoint.trainable_state(module).values())
    values += checkpoint.read_tensors(folder / checkpoint.OPTIMIZER).values()
    assert all((value == step).all() for value in values)
    assert (folder / "tokenizer").read_bytes() == b"abc"
    return step


def names(root):
    return sorted(path.name for path in root.iterdir())


@pytest.fixture(autouse=True)
def fsync(monkeypatch):
    """Waiting for the disk matters to a power cut only, and takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def three(root):
    """A run with steps 1, 2 and 3, of which 2 was best."""
    for step in (1, 2, 3):
        save(root, f"epoch_{step:03d}", step, best=step == 2)
    return root


# ---- what a checkpoint holds, and loading it


def test_a_checkpoint_and_its_links(root):
    folder = save(root, "epoch_001", 1, best=True, config={"lr": 1e-3}, labels=["happy"])
    assert folder == root / "epoch_001"
    assert names(folder) == ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer"]
    assert json.loads((folder / "state.json").read_text()) == {"step": 1, "config": {"lr": 1e-3}, "labels": ["happy"]}
    assert set(checkpoint.read_tensors(folder / "model.safetensors")) == TENSORS
    assert (os.readlink(root / "last"), os.readlink(root / "best")) == ("epoch_001", "epoch_001")
    save(root, "step_000002", 2)
    assert (os.readlink(root / "last"), os.readlink(root / "best")) == ("step_000002", "epoch_001")
    assert names(root) == ["best", "epoch_001", "last", "step_000002"]


def test_loading_is_bit_exact_and_reports_coverage(root):
    torch.manual_seed(0)
    source, target = Net(0.0), Net(7.0)
    nn.init.normal_(source.lora_A)
    nn.init.normal_(source.head)
    folder = checkpoint.save(root, "epoch_001", source, {}, {"step": 1}, {})
    line = checkpoint.load_model(target, folder)
    assert line == "1/1 LoRA tensors, 2/2 projection tensors, 2/2 other tensors"
    for name in TENSORS:
        assert torch.equal(source.state_dict()[name], target.state_dict()[name])
    assert target.frozen.tolist() == [7.0] * 4
    assert target.cache.tolist() == [7.0] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": None, "mean": None}, "3/5 tensors match the model; 2 missing: head, mean"),
        ({"extra": torch.ones(1)}, "5/5 tensors match the model; 1 unexpected: extra"),
        (
            {"head": None, "frozen": torch.ones(4)},
            "4/5 tensors match the model; 1 missing: head; 1 unexpected: frozen",
        ),
        ({"head": torch.ones(3, 2)}, "1 tensors of the wrong shape: head is (3, 2), not (2, 3)"),
    ],
    ids=["missing", "extra", "both", "shape"],
)
def test_loading_is_strict(root, change, message):
    folder = save(root, "epoch_001", 1)
    file = folder / checkpoint.MODEL
    tensors = checkpoint.read_tensors(file) | change
    save_file({name: value.clone() for name, value in tensors.items() if value is not None}, file)
    module = Net(5.0)
    with pytest.raises(UserError) as error:
        checkpoint.load_model(module, folder)
    assert str(error.value) == f"{file}: {message}"
    assert all((module.state_dict()[name] == 5.0).all() for name in ("lora_A", "head", "mean"))


def test_files_that_cannot_be_read(root):
    folder = save(root, "epoch_001", 1)
    (folder / checkpoint.MODEL).write_bytes((folder / checkpoint.MODEL).read_bytes()[:-5])
    with pytest.raises(UserError, match=r"epoch_001/model.safetensors: not a readable safetensors file \(.+\)$"):
        checkpoint.load_model(Net(0.0), folder)
    for content, message in (
        ("{", r"not JSON \(.+\)"),
        ("[1]", "not a JSON object"),
        ("{}", "no step, so this is no checkpoint of a run"),
    ):
        (folder / checkpoint.STATE).write_text(content)
        with pytest.raises(UserError, match=rf"epoch_001/state.json: {message}$"):
            checkpoint.read_state(folder)
    (folder / checkpoint.STATE).unlink()
    with pytest.raises(UserError, match=r"epoch_001/state.json: No such file or directory$"):
        checkpoint.read_state(folder)


# ---- saving again


def test_saving_the_same_step_twice_writes_once(three):
    inode = (three / "epoch_003" / checkpoint.MODEL).stat().st_ino
    save(three, "epoch_003", 3, best=True)
    assert (three / "epoch_003" / checkpoint.MODEL).stat().st_ino == inode
    assert os.readlink(three / "best") == "epoch_003"
    assert "superseded" not in names(three)


def test_another_checkpoint_of_the_same_name_is_set_aside(three):
    save(three, "epoch_003", 30)  # resumed with longer epochs
    save(three, "epoch_003", 31)
    assert step_of(three / "epoch_003") == step_of(three / "last") == 31
    assert [step_of(three / "superseded" / name) for name in ("epoch_003", "epoch_003.1")] == [3, 30]


def test_keep_spares_the_newest_the_best_and_what_the_user_named(three):
    (three / "epoch_001").rename(three / "favourite")
    for step in (4, 5):
        save(three, f"epoch_{step:03d}", step, keep=2)
    assert names(three) == ["best", "epoch_002", "epoch_004", "epoch_005", "favourite", "last"]
    save(three, "epoch_006", 6, best=True, keep=1)
    assert names(three) == ["best", "epoch_006", "favourite", "last"]
    assert step_of(three / "best") == 6


def test_keep_counts_steps_not_names(root):
    for name, step in (("epoch_001", 100), ("step_000150", 150), ("epoch_002", 200)):
        save(root, name, step, keep=2)
    assert names(root) == ["epoch_002", "last", "step_000150"]


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(three, monkeypatch):
    def refuse(self, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    save(three, "epoch_004", 4)
    monkeypatch.setattr(Path, "rename", refuse)
    save(three, "epoch_004", 4, keep=1)
    assert names(three) == ["best", "epoch_001", "epoch_002", "epoch_003", "epoch_004", "last"]


@pytest.mark.parametrize("best", [True, False])
def test_a_run_copied_without_links_goes_on(three, tmp_path, best):
    copy = tmp_path / "copy"
    shutil.copytree(three, copy)  # follows links: last and best are folders now
    assert not (copy / "last").is_symlink()
    save(copy, "epoch_004", 4, best=best)
    assert (os.readlink(copy / "last"), (copy / "best").is_symlink()) == ("epoch_004", best)
    assert step_of(copy / "best") == (4 if best else 2)
    assert step_of(copy / "superseded" / "last") == 3


# ---- finding a checkpoint


def test_resolve_takes_a_run_its_checkpoints_or_one_of_them(three, monkeypatch):
    for path in (three.parent, three, three / "last", three / "epoch_003"):
        assert checkpoint.resolve(path) == (three / "epoch_003").resolve()
    for path in (three.parent, three, three / "best", three / "epoch_002"):
        assert checkpoint.resolve(str(path), prefer="best") == (three / "epoch_002").resolve()
    monkeypatch.chdir(three)
    assert checkpoint.resolve("epoch_001") == (three / "epoch_001").resolve()


def test_resolve_and_newest_of_copies_and_other_names(three, tmp_path):
    shutil.copytree(three / "epoch_002", tmp_path / "mine")
    assert step_of(checkpoint.resolve(tmp_path / "mine")) == 2
    shutil.copytree(three / "last", tmp_path / "only" / "last")
    assert step_of(checkpoint.resolve(tmp_path / "only")) == 3
    assert step_of(checkpoint.resolve(tmp_path / "only", prefer="best")) == 3
    assert step_of(checkpoint.newest(tmp_path / "only")) == 3
    shutil.copytree(three.parent, tmp_path / "moved", symlinks=True)
    shutil.rmtree(three)
    assert step_of(checkpoint.resolve(tmp_path / "moved", prefer="best")) == 2
    (tmp_path / "moved/checkpoints/epoch_003").rename(tmp_path / "moved/checkpoints/final")  # last dangles
    assert step_of(checkpoint.resolve(tmp_path / "moved")) == 3
    assert step_of(checkpoint.newest(tmp_path / "moved/checkpoints")) == 3


def test_resolve_without_links_takes_the_newest(root):
    for name, step in (("epoch_010", 9), ("epoch_002", 20), ("step_000015", 15)):
        save(root, name, step)
    (root / "last").unlink()
    assert step_of(checkpoint.resolve(root.parent, prefer="best")) == 20
    assert [path.name for path in checkpoint.checkpoints(root)] == ["epoch_010", "step_000015", "epoch_002"]


def test_resolve_says_what_it_wants(tmp_path):
    wanted = "(a run folder, its checkpoints/ or one checkpoint folder)"
    for path, reason in ((tmp_path, "holds no checkpoint"), (tmp_path / "none", "not found")):
        with pytest.raises(UserError) as error:
            checkpoint.resolve(path)
        assert str(error.value) == f"checkpoint {path}: {reason} {wanted}"
    assert checkpoint.newest(tmp_path / "none") is None


def test_rewind_sets_later_checkpoints_aside(root):
    for step, best in ((1, "epoch_001"), (2, "epoch_001"), (3, "epoch_003"), (4, "epoch_003")):
        save(root, f"epoch_{step:03d}", step, best=best == f"epoch_{step:03d}", best_so_far=best)
    state = {"step": 2, "best": {"checkpoint": "epoch_001"}}
    assert checkpoint.rewind(root, state) == ["epoch_003", "epoch_004"]
    assert names(root) == ["best", "epoch_001", "epoch_002", "last", "superseded"]
    assert (os.readlink(root / "last"), os.readlink(root / "best")) == ("epoch_002", "epoch_001")
    assert checkpoint.rewind(root, state) == []
    save(root, "epoch_003", 3, best=True)
    assert checkpoint.rewind(root, {"step": 1, "best": {}}) == ["epoch_002", "epoch_003"]
    assert names(root) == ["epoch_001", "last", "superseded"]  # step 1 knew no best
    assert names(root / "superseded") == ["epoch_002", "epoch_003", "epoch_003.1", "epoch_004"]


def test_rewind_links_what_a_kill_left_unlinked(three):
    (three / "last").unlink()
    (three / "last").symlink_to("epoch_002")
    assert checkpoint.rewind(three, {"step": 3}) == []
    assert os.readlink(three / "last") == "epoch_003"


def test_rewind_takes_free_names(three):
    (three / "superseded" / "epoch_003.1").mkdir(parents=True)
    for expected in (["epoch_003", "epoch_003.1"], ["epoch_003", "epoch_003.1", "epoch_003.2"]):
        checkpoint.rewind(three, {"step": 2})
        assert names(three / "superseded") == expected
        save(three, "epoch_003", 3)


# ---- errors and kills while saving


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*args, **kwargs):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def write_half(self, content):
    with open(self, "wb") as file:
        file.write(content[: len(content) // 2])
    no_space()


@pytest.mark.parametrize(
    ("owner", "name", "failure"),
    [
        (checkpoint, "save_file", no_space),
        (checkpoint, "save_file", no_space_in_rust),
        (Path, "write_bytes", write_half),
        (os, "fsync", no_space),
        (os, "rename", no_space),
        (os, "symlink", no_space),
        (os, "replace", no_space),
        (os, "mkdir", no_space),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_full_disk_leaves_earlier_checkpoints_as_they_were(three, monkeypatch, owner, name, failure):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failure)
        with pytest.raises(UserError) as error:
            save(three, "epoch_004", 4, best=True, keep=1)
    expected = f"cannot save {three / 'epoch_004'}: no space left on the disk; earlier checkpoints are kept"
    assert str(error.value) == expected
    assert set(names(three)) - {"epoch_004"} == {"best", "epoch_001", "epoch_002", "epoch_003", "last"}
    assert [step_of(three / f"epoch_{step:03d}") for step in (1, 2, 3)] == [1, 2, 3]
    assert (step_of(checkpoint.resolve(three)), step_of(checkpoint.resolve(three, "best"))) == (3, 2)
    save(three, "epoch_004", 4, best=True)  # there is room again
    assert step_of(checkpoint.resolve(three)) == step_of(checkpoint.resolve(three, "best")) == 4


def test_another_error_says_its_reason(root, monkeypatch):
    root.parent.mkdir()
    root.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"^cannot save .*/epoch_001: \[Errno 17\] File exists: .*; earlier"):
        save(root, "epoch_001", 1)


def test_leftovers_of_a_process_with_the_same_number_do_not_matter(three):
    leftover = three / f".tmp-epoch_004-{os.getpid()}"
    leftover.mkdir()
    (leftover / "junk").touch()
    (three / f".tmp-last-{os.getpid()}").symlink_to("epoch_001")
    save(three, "epoch_004", 4)
    assert names(three / "epoch_004") == ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer"]
    assert not list(three.glob(".tmp-*"))


EVENTS = {"open", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.symlink"}


def forked(action, react):
    """Runs action() in a forked child that calls react(k) before its k-th file system call; the child's exit code.

    Calls are seen through audit events, whoever makes them (os, pathlib, shutil, open), through fsync, and through
    save_file, which is also seen half-way.
    """
    process = get_context("fork").Process(target=watched, args=(action, react))
    process.start()
    process.join()
    return process.exitcode


def watched(action, react):
    calls, reacting = itertools.count(), []

    def call(*_):
        if not reacting:
            reacting.append(True)
            react(next(calls))
            reacting.clear()

    def write_tensors(tensors, path, write=checkpoint.save_file):
        write(tensors, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        call()
        path.write_bytes(whole)

    checkpoint.save_file, os.fsync = write_tensors, call
    sys.addaudithook(lambda event, _: event in EVENTS and call())
    action()


def moments(base, folder, action):
    """What a kill before each file system call of action(root) would leave of a root that was like `base`."""
    root = folder / "root"
    if base.exists():
        shutil.copytree(base, root, symlinks=True)

    def photograph(k):
        (folder / str(k)).mkdir(parents=True)
        if root.exists():
            shutil.copytree(root, folder / str(k) / "checkpoints", symlinks=True)

    assert forked(partial(action, root), photograph) == 0
    return [folder / str(k) / "checkpoints" for k in range(sum(path.name.isdigit() for path in folder.iterdir()))]


def tree(root):
    """Every file and link below root with its content; numbers of processes are left out of names."""
    paths = [path for path in root.rglob("*") if path.is_symlink() or path.is_file()]
    names = [re.sub(r"(\.tmp-.+)-\d+", r"\1", path.relative_to(root).as_posix()) for path in paths]
    return {name: os.readlink(p) if p.is_symlink() else p.read_bytes() for name, p in zip(names, paths, strict=True)}


def cleaned(root):
    """What is visible in root, once clean() took away all else and nothing of it."""
    before = [name for name in names(root) if not name.startswith(".")]
    checkpoint.clean(root)
    assert names(root) == before
    return before


def test_a_kill_leaves_what_was_there_at_that_moment(three, tmp_path):
    action = partial(save, name="epoch_004", step=4, best=True, keep=1)
    photographs = moments(three, tmp_path, action)
    for k in range(3, len(photographs), 9):
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(three, work, symlinks=True)
        assert forked(partial(action, work), lambda now, k=k: now == k and signal.raise_signal(signal.SIGKILL)) == -9
        assert tree(work) == tree(photographs[k])


@pytest.mark.parametrize("name", ["epoch_004", "epoch_003"])
def test_a_kill_anywhere_in_save_leaves_whole_checkpoints(three, tmp_path, name):
    seen = []
    for root in moments(three, tmp_path, lambda root: save(root, name, 4, best=True, keep=1)):
        newest, last, best = checkpoint.newest(root), checkpoint.resolve(root), checkpoint.resolve(root, prefer="best")
        seen.append((step_of(newest), step_of(last), step_of(best)))
        cleaned(root)
        assert (checkpoint.newest(root), checkpoint.resolve(root)) == (newest, last)
        save(root, name, 4, best=True, keep=1)  # the resumed run comes by again
        assert set(names(root)) - {"superseded"} == {"best", "last", name}
        assert step_of(root / "last") == step_of(root / "best") == 4
    before, moved, best_moved = (3, 3, 2), (4, 4, 2), (4, 4, 4)
    # between the two renames: the new folder without its link; or, under an old one's name, that one set aside
    between = (4, 3, 2) if name == "epoch_004" else (2, 2, 2)
    assert [each for each, _ in itertools.groupby(seen)] == [before, between, moved, best_moved]


def test_a_kill_anywhere_in_the_first_save(tmp_path):
    seen = []
    for root in moments(tmp_path / "none", tmp_path, lambda root: save(root, "epoch_001", 1, best=True)):
        newest = checkpoint.newest(root)
        seen.append(newest and step_of(newest))
        if root.exists():
            assert set(cleaned(root)) <= {"epoch_001", "last", "best"}
        save(root, "epoch_001", 1, best=True)
        assert names(root) == ["best", "epoch_001", "last"]
        assert step_of(checkpoint.resolve(root, prefer="best")) == 1
    assert [each for each, _ in itertools.groupby(seen)] == [None, 1]


def test_a_kill_anywhere_in_rewind_loses_nothing(three, tmp_path):
    seen = []
    for root in moments(three, tmp_path, lambda root: checkpoint.rewind(root, {"step": 1, "best": {}})):
        found = [*checkpoint.checkpoints(root), *(root / "superseded").glob("*")]
        assert sorted(map(step_of, found)) == [1, 2, 3]
        seen.append((step_of(checkpoint.resolve(root)), len(checkpoint.checkpoints(root))))
        cleaned(root)
        checkpoint.rewind(root, {"step": 1, "best": {}})
        assert [path.name for path in checkpoint.checkpoints(root)] == ["epoch_001"]
    assert [each for each, _ in itertools.groupby(seen)] == [(3, 3), (1, 3), (1, 2)]


# ---- the commit, and the lock of a run folder


def test_commit(monkeypatch):
    assert len(checkpoint.commit()) in (0, 40)
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert checkpoint.commit() == ""


def dead():
    """The number of a process that is gone."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def locked_by(out, pid, host=None):
    out.mkdir(exist_ok=True)
    (out / ".lock").write_text(json.dumps({"host": host or socket.gethostname(), "pid": pid}))


def test_a_run_folder_is_held_and_given_back(tmp_path):
    out = tmp_path / "out" / "run"
    lock = checkpoint.RunLock(out)
    assert json.loads((out / ".lock").read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    lock.release()
    assert names(out) == []
    lock.release()


def test_a_second_holder_is_refused_until_the_first_is_gone(tmp_path):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            checkpoint.RunLock(tmp_path)
            os.write(writer, b"held")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 4) == b"held"
        with pytest.raises(UserError) as error:
            checkpoint.RunLock(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    assert str(error.value) == (
        f"{tmp_path} is in use by process {pid} on {socket.gethostname()}; "
        f"choose another --out, or delete {tmp_path / '.lock'} if that process is gone"
    )
    checkpoint.RunLock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_process_of_another_user_counts_as_alive(tmp_path, monkeypatch):
    def kill(pid, number):
        raise PermissionError

    locked_by(tmp_path, 12345)
    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(UserError, match="is in use by process 12345 on"):
        checkpoint.RunLock(tmp_path)


def test_a_process_that_ended_but_is_still_listed_is_gone(tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # ended, and left as a zombie
    try:
        locked_by(tmp_path, pid)
        checkpoint.RunLock(tmp_path)
    finally:
        os.waitpid(pid, 0)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_another_machine_is_believed(tmp_path):
    locked_by(tmp_path, dead(), "elsewhere")
    with pytest.raises(UserError, match=r"is in use by process \d+ on elsewhere; choose another --out"):
        checkpoint.RunLock(tmp_path)


@pytest.mark.parametrize("content", ["", '{"host": "x", "pi', None], ids=["empty", "half", "own number"])
def test_locks_that_mean_nothing_are_taken_over(tmp_path, content):
    locked_by(tmp_path, os.getpid())  # an earlier process had this number, or an earlier run of this process failed
    if content is not None:
        (tmp_path / ".lock").write_text(content)
    checkpoint.RunLock(tmp_path).release()
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        checkpoint.RunLock(tmp_path / "file")
    assert str(error.value) == f"cannot write to {tmp_path / 'file'}: File exists"


def contend(out, gone, rounds):
    """How many ranks got a lock whose holder is gone, in each round, and whether a copy of it gave it back."""
    here, winners, kept = dist.setup("cpu"), [], []
    for _ in range(rounds):
        if here.main:
            locked_by(out, gone)
        dist.barrier()
        try:
            lock = checkpoint.RunLock(out)
        except UserError:
            lock = None
        held = dist.gather(lock)
        winners.append(sum(each is not None for each in held))
        if lock is None:
            for each in filter(None, held):
                each.release()
        dist.barrier()
        kept.append((out / ".lock").exists())
        dist.barrier()
    dist.barrier()
    return winners, all(kept)


def test_a_stale_lock_goes_to_one_process_only(ranks, tmp_path):
    assert ranks(3, contend, tmp_path, dead(), 40) == [([1] * 40, True)] * 3
