"""Parameters cut over the ranks (FSDP2), and the tensors that such ranks write and read, each its own rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from common.config import UserError
from common.dist import Ranks
from common.weights import open_tensors

FILE = 2**30  # bytes that a rank writes to one file, which is put together in host memory


def shard(
    module: nn.Module,
    layers: Sequence[nn.Module],
    here: Ranks,
    dtype: torch.dtype,
    release: bool,
    offload: bool = False,
    entrances: Sequence[str] = (),
) -> None:
    """Cuts the parameters of `module` into rows over all ranks, which must be connected.

    A layer's are gathered, in `dtype`, while it runs, the others' while `module` runs: its forward method or one of
    `entrances`. With `release` a layer's are freed between its forward and its backward pass too (ZeRO-3; else ZeRO-2).
    Trained ones are held in float32, frozen ones in `dtype`, with `offload` in host memory; gradients are averaged in
    float32. Tensors may come on the CPU, mapped from files: one layer at a time moves to the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(here.device.type, (here.world,))
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    # autocast would make low-precision copies of gathered float32 weights, and keep all layers' until the pass ends
    mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        _settle(layer, here.device, dtype)
        fully_shard(layer, mesh=mesh, reshard_after_forward=release, mp_policy=mixed, offload_policy=where)
    _settle(module, here.device, dtype)
    # the rest is needed last in the forward pass and first in the backward pass
    fully_shard(module, mesh=mesh, reshard_after_forward=False, offload_policy=where)
    for name in entrances:
        register_fsdp_forward_method(module, name)


def _settle(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Puts what is not sharded yet where and how fully_shard() wants it."""
    for parameter in module.parameters():
        if not is_sharded(parameter):
            held = torch.float32 if parameter.requires_grad else dtype
            parameter.data = parameter.data.to(device, held).contiguous()


def release(module: nn.Module) -> None:
    """Frees what is still gathered: after a forward pass without a backward pass nothing else does."""
    for part in module.modules():
        if reshard := getattr(part, "reshard", None):
            reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a rank holds but rows of it, as a DTensor; importing that to ask takes seconds."""
    return hasattr(tensor, "device_mesh")


def place(module: nn.Module) -> torch.device:
    """Where `module` computes; parameters in host memory are elsewhere."""
    first: Any = next(module.parameters())
    return torch.device(first.device_mesh.device_type) if is_sharded(first) else first.device


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is sharded; all ranks call it."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor over `target`, or of it the rows that this rank holds of a sharded one."""
    if not is_sharded(target):
        target.copy_(source)
        return
    held: Any = target
    rows = -(-len(source) // held.device_mesh.size())  # the last ranks may have fewer, or none
    first = held.device_mesh.get_local_rank() * rows
    held.to_local().copy_(source[first : first + rows])


def like(source: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a whole tensor beside `parameter`, sharded as that is unless it is a single number."""
    if source.ndim == 0 or not is_sharded(parameter):
        return source.to(parameter.device, copy=True)
    made = torch.zeros_like(parameter, dtype=source.dtype)
    fill(made, source)
    return made


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes safetensors files in which each rank's rows lie apart, synced; all ranks call it together.

    The layout is torch.distributed.checkpoint's for Hugging Face. An error of one rank is raised by all.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // FILE
        size += tensor.nbytes // td.get_world_size()
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), files, save_distributed=True))
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class Parts(Mapping[str, Tensor]):
    """The tensors of a folder that write() has filled, each put together when it is asked for, by any process.

    A file that is damaged, or rows that are missing between others, are a UserError; that the last are missing shows
    in `shapes`, for which headers are enough.
    """

    def __init__(self, folder: Path) -> None:
        self.pieces: dict[str, list[Any]] = {}  # the open files that hold rows of a tensor, in order
        self.shapes: dict[str, tuple[int, ...]] = {}
        found = []
        for path in sorted(folder.glob("*.safetensors")):
            file = open_tensors(path)
            try:
                told = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
                starts = {name: (*told[name]["saved_offsets"], 0)[0] for name in file.keys()}
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}: does not say which rows it holds") from None
            found += [(start, name, file) for name, start in starts.items()]
        for start, name, file in sorted(found, key=lambda piece: piece[:2]):
            shape = tuple(file.get_slice(name).get_shape())
            rows = self.shapes[name][0] if self.shapes.get(name) else 0
            if start != rows:
                raise UserError(f"{folder}: rows {rows} to {start} of {name} are missing")
            self.shapes[name] = (start + shape[0], *shape[1:]) if shape else ()
            self.pieces.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        rows = [file.get_tensor(name) for file in self.pieces[name]]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Their shapes; those of Parts without reading them."""
    return tensors.shapes if isinstance(tensors, Parts) else {name: tuple(t.shape) for name, t in tensors.items()}
