import os
import platform
import random
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as td

from bench.report import apart, memory
from common import dist
from common.config import UserError


def test_a_plain_run_is_one_process_on_the_cpu(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    here = dist.setup("cpu")
    assert (here.rank, here.world, here.local_rank, here.device, here.main) == (0, 1, 0, torch.device("cpu"), True)
    assert not td.is_initialized()
    assert dist.all_sum(1, True, 2.5) == [1.0, 1.0, 2.5]
    assert dist.gather("a") == ["a"]
    assert dist.broadcast({"a": 1}) == {"a": 1}
    assert dist.main_first(here, lambda: 7) == 7
    dist.barrier()
    dist.cleanup()


def test_torchrun_names_the_process(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    here = dist.ranks("cpu")
    assert (here.rank, here.world, here.local_rank, here.main) == (5, 8, 1, False)
    monkeypatch.delenv("WORLD_SIZE")  # RANK alone is somebody else's variable
    assert dist.ranks("cpu").world == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", ""])
def test_a_device_that_is_none(device):
    with pytest.raises(UserError) as error:
        dist.ranks(device)
    assert str(error.value) == f"--device: {device!r} is not a device (auto, cpu, cuda, cuda:N)"


def test_devices_that_are_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dist.ranks("auto").device == torch.device("cpu")
    with pytest.raises(UserError) as error:
        dist.ranks("cuda")
    assert str(error.value) == "--device cuda: no CUDA device here (cpu works everywhere)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert dist.ranks("auto").device == torch.device("cuda", 1)
    assert dist.ranks("cuda:0").device == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError) as error:
        dist.ranks("cuda")
    assert str(error.value) == "--device cuda: no cuda:2 here, only 2 CUDA devices"


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is for glibc")
def test_freed_memory_stays_with_the_process():
    given_back, kept = apart(freed)  # a fork would have what runs before it in this process have set
    assert given_back < 32 < kept


def freed():
    """MiB that a process has more after it has freed some, before and after keep_memory()."""
    found = []
    for keep in (False, True):
        if keep:
            dist.keep_memory(torch.device("cpu"))
        before = memory("VmRSS")
        torch.ones(2**24)  # 64 MiB
        found.append(memory("VmRSS") - before)
    return found


def test_tf32_is_for_gpus_alone():
    before = torch.get_float32_matmul_precision()
    try:
        dist.use_tf32(True, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == before
        dist.use_tf32(True, torch.device("cuda", 0))
        assert (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision) == ("high", "tf32")
        dist.use_tf32(False, torch.device("cuda", 0))
        assert (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision) == ("highest", "ieee")
    finally:
        torch.set_float32_matmul_precision(before)


def test_seeds_are_a_function_of_seed_step_and_rank():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 3, 1)]
    drawn = []
    for key in keys:
        dist.seed_all(*key)
        drawn.append(draw())
    for column in zip(*drawn, strict=True):  # each generator on its own
        assert len(set(column)) == len(keys)
    dist.seed_all(*keys[2])
    assert draw() == drawn[2]


def collect():
    here = dist.setup("cpu")
    numbers = dist.all_sum(here.rank + 1, here.rank == 0, 0.1 + here.rank)
    dist.barrier()
    return here, numbers, dist.gather({"rank": here.rank}), dist.broadcast(f"of {here.rank}"), td.is_initialized()


@pytest.mark.parametrize("world", [1, 2])
def test_collectives(ranks, world):
    for rank, (here, numbers, gathered, sent, joined) in enumerate(ranks(world, collect)):
        assert (here.rank, here.world, here.local_rank) == (rank, world, rank)
        assert numbers == pytest.approx([1, 1, 0.1] if world == 1 else [3, 1, 1.2], abs=1e-15)
        assert gathered == [{"rank": each} for each in range(world)]
        assert sent == "of 0"
        assert joined == (world > 1)


def alone():
    os.environ.pop("MASTER_ADDR")  # a plain run has none
    dist.connect(dist.Ranks(), sharded=True)
    return td.is_initialized(), dist.gather("a"), dist.main_first(dist.Ranks(), lambda: 7)


def test_one_process_has_a_group_of_its_own_for_what_is_sharded(ranks):
    assert ranks(1, alone) == [(True, ["a"], 7)]


ROWS, FEATURES = 3, 2  # of each rank


def values(rank):
    return torch.randn(2, ROWS, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def gather_and_learn(transposed):
    """Rows of all ranks, and the gradient of this rank's by the losses of all: each weighs rows by its own factors."""
    here = dist.setup("cpu")
    x = values(here.rank)
    if transposed:  # not contiguous
        x = x.mT.contiguous().mT
    x.requires_grad_()
    every = dist.gather_rows(x)
    (every.square() * factors(here.rank, here.world)).sum().backward()
    assert x.grad is not None
    return every.detach().numpy(), x.grad.numpy()


def factors(rank, world):
    return (1 + rank) * torch.arange(2.0 * world * ROWS * FEATURES).view(2, world * ROWS, FEATURES)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_of_all_ranks_and_their_gradients(ranks, world, transposed):
    every = torch.cat([values(rank) for rank in range(world)], 1)
    weight = torch.stack([factors(rank, world) for rank in range(world)]).sum(0)
    expected = (2 * every * weight).split(ROWS, 1)
    for (found, grad), own in zip(ranks(world, gather_and_learn, transposed), expected, strict=True):
        assert torch.equal(torch.from_numpy(found), every)
        torch.testing.assert_close(torch.from_numpy(grad), own)


def work_first(folder):
    """main_first with a result, then with a mistake, then a collective that finds the ranks still in step."""
    here = dist.setup("cpu")

    def work():
        (folder / f"by{here.rank}").touch()
        return {"answer": 42}

    def mistake():
        raise UserError("--out: not here")

    result = dist.main_first(here, work)
    seen = (folder / "by0").exists()  # no rank goes on before rank 0 is done
    try:
        dist.main_first(here, mistake)
    except UserError as error:
        return result, seen, str(error), dist.all_sum(1)
    return None


@pytest.mark.parametrize("world", [1, 2])
def test_main_first(ranks, tmp_path, world):
    expected = ({"answer": 42}, True, "--out: not here", [float(world)])
    assert ranks(world, work_first, tmp_path) == [expected] * world
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by0"]


def stop_together():
    """Rank 0 alone is asked to stop before step 3; the step at which each rank stops."""
    here, stop = dist.setup("cpu"), dist.Stop()
    for step in range(6):
        if step == 3 and here.main:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.asked(here):
            return step, stop.requested
    return None


def test_a_stop_reaches_all_ranks_in_the_same_step(ranks):
    assert ranks(2, stop_together) == [(3, True), (3, False)]


def interrupt_twice():
    stop = dist.Stop()
    os.kill(os.getpid(), signal.SIGINT)
    asked = stop.requested
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        return asked, "interrupted"
    return asked, "went on"


def test_a_second_ctrl_c_means_now(ranks):
    assert ranks(1, interrupt_twice) == [(True, "interrupted")]


def lose_the_parent(pipe):
    """Forks a rank, as torchrun would, and dies; the rank sends whether it was an orphan before and after, and ends."""
    middle = os.getpid()
    if os.fork() == 0:
        dist.PARENT = middle
        seen = [dist.Stop.orphaned()]
        os.kill(middle, signal.SIGKILL)
        while os.getppid() == middle:
            pass
        seen += [dist.Stop.orphaned(), ends()]
        dist.LAUNCHED = False
        os.write(pipe, bytes([*seen, dist.Stop.orphaned(), ends()]))
        os._exit(0)
    signal.pause()


def ends():
    """Whether a training loop that asks would end this rank."""
    try:
        return dist.Stop().asked(dist.Ranks())
    except SystemExit as end:
        return str(end) == "torchrun is gone: this rank stops"


def test_a_rank_without_its_torchrun_is_an_orphan_and_ends():
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        dist.LAUNCHED = True
        lose_the_parent(writer)
    os.close(writer)
    os.waitpid(middle, 0)
    with os.fdopen(reader, "rb") as pipe:
        # the last two: a plain run may outlive its shell
        assert list(pipe.read()) == [False, True, True, False, False]


def fail_on(rank):
    here = dist.setup("cpu")
    if here.rank == rank:
        raise ValueError("of this rank alone")
    time.sleep(60)  # the others wait in vain: in a collective they could be told first that their peer is gone


def test_ranks_fails_with_the_traceback_of_a_rank(ranks):
    with pytest.raises(pytest.fail.Exception, match=r"rank 1:\n(.*\n)*ValueError: of this rank alone"):
        ranks(2, fail_on, 1)


def test_ranks_fails_for_a_rank_that_dies(ranks):
    with pytest.raises(pytest.fail.Exception, match="rank 0 died without an answer, exit code 3"):
        ranks(1, os._exit, 3)


def hang(folder):
    (folder / str(os.getpid())).touch()
    if os.fork() == 0:
        (folder / str(os.getpid())).touch()
    signal.pause()


def test_ranks_kills_everything_at_its_timeout(ranks, tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0, 1\] of 2 did not end within 1 s"):
        ranks(2, hang, tmp_path, timeout=1.0)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 4
    deadline = time.monotonic() + 10  # a killed process takes a moment to go
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(running, pids))


def running(pid):
    """Whether a process still runs; one that was killed may wait as a zombie for its new parent."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
