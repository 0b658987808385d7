"""Processes: ranks and device from torchrun's environment, seeds, small collectives, a stop that all ranks agree on."""

import contextlib
import ctypes
import datetime
import os
import random
import signal
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as td

from common.config import UserError

LAUNCHED = "RANK" in os.environ and "WORLD_SIZE" in os.environ
PARENT = os.getppid()  # read at import: torchrun may die before the first step


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; world is 1 for a plain python run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        return self.rank == 0


def ranks(device: str = "auto") -> Ranks:
    """Ranks and device of this process; opens no connection, so that a user's mistake is found before one is."""
    env = os.environ if "RANK" in os.environ and "WORLD_SIZE" in os.environ else {}
    rank, world, local = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {device!r} is not a device (auto, cpu, cuda, cuda:N)")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: no CUDA device here (cpu works everywhere)")
        if chosen.index is None:
            chosen = torch.device("cuda", local)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: no {chosen} here, only {torch.cuda.device_count()} CUDA devices")
    return Ranks(rank, world, local, chosen)


def connect(here: Ranks, sharded: bool = False) -> None:
    """Joins the process group when there is more than one process: NCCL on CUDA, gloo on CPU.

    A `sharded` model wants a group even of one, and on CUDA gloo too, for what it keeps in host memory.
    """
    if here.device.type == "cuda":
        torch.cuda.set_device(here.device)
    if (here.world > 1 or sharded) and not td.is_initialized():
        backend = ("cpu:gloo,cuda:nccl" if sharded else "nccl") if here.device.type == "cuda" else "gloo"
        # one process has nobody to meet, so it needs no address
        store = td.HashStore() if here.world == 1 else None  # pyright: ignore
        limit = datetime.timedelta(minutes=30)
        td.init_process_group(backend, rank=here.rank, world_size=here.world, timeout=limit, store=store)


def setup(device: str = "auto") -> Ranks:
    """ranks() and connect() in one."""
    here = ranks(device)
    connect(here)
    return here


def cleanup() -> None:
    if td.is_initialized():
        td.destroy_process_group()


def seed_all(seed: int, step: int = 0, rank: int = 0) -> None:
    """Reseeds every generator from (seed, step, rank): a resumed run draws what the unbroken one would have drawn."""
    value = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def keep_memory(device: torch.device) -> None:
    """Keeps what tensors on a CPU free, for the next step's: fresh pages cost up to a quarter of a training step.

    glibc's mallopt(3): no block is a mapping of its own and the heap is never trimmed. Elsewhere nothing happens.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def use_tf32(on: bool, device: torch.device) -> None:
    """Whether float32 matmuls on a GPU round what they multiply to TF32; elsewhere nothing happens."""
    if device.type == "cuda":
        # not fp32_precision of torch.backends: torch.compile, which reads this one, fails where that was set
        torch.set_float32_matmul_precision("high" if on else "highest")


def all_sum(*values: float, device: torch.device | None = None) -> list[float]:
    """Sums each number over all ranks."""
    if not td.is_initialized():
        return [float(v) for v in values]
    numbers = torch.tensor(values, dtype=torch.float64, device=device if device and device.type == "cuda" else "cpu")
    td.all_reduce(numbers)
    return numbers.tolist()


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(td.get_world_size())]
        td.all_gather(parts, x)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0].contiguous()
        td.all_reduce(grad)  # every rank's loss has read these rows
        return grad.chunk(td.get_world_size(), 1)[td.get_rank()]


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """x (K, b, ...) of all ranks, as many rows on each -> (K, b * world, ...) in rank order.

    Gradients flow back to the rank the rows came from, summed over the losses of all ranks.
    """
    out = _Rows.apply(x) if td.is_initialized() else x
    assert isinstance(out, torch.Tensor)
    return out


def gather(obj: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank."""
    if not td.is_initialized():
        return [obj]
    out: list[Any] = [None] * td.get_world_size()
    td.all_gather_object(out, obj)
    return out


def broadcast(obj: Any) -> Any:
    """Rank 0's object on every rank."""
    if not td.is_initialized():
        return obj
    box = [obj]
    td.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if td.is_initialized():
        td.barrier()


def fits(size: int, here: Ranks) -> bool:
    """Whether `size` bytes take less than half of the GPU's free memory."""
    return size < torch.cuda.mem_get_info(here.device)[0] / 2


def main_first(here: Ranks, work: Any) -> Any:
    """Runs work() on rank 0 while the others wait, and gives every rank its result; its UserError reaches all ranks."""
    result, error = None, None
    if here.main:
        try:
            result = work()
        except UserError as mistake:
            error = str(mistake)
    result, error = broadcast((result, error))
    if error is not None:
        raise UserError(error)
    return result


class Stop:
    """Set by SIGTERM or SIGINT; the training loop adds it up over ranks each step, so that all stop after the same."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.requested = True

    def asked(self, here: Ranks) -> bool:
        """Whether any rank was asked to stop; a rank whose torchrun is gone ends here."""
        if self.orphaned():
            raise SystemExit("torchrun is gone: this rank stops")
        return bool(all_sum(self.requested, device=here.device)[0])

    def release(self) -> None:
        """Gives SIGTERM and SIGINT back to Python."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @staticmethod
    def orphaned() -> bool:
        """Whether the torchrun that started this rank is gone; a plain run may outlive its shell."""
        return LAUNCHED and os.getppid() != PARENT
