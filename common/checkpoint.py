"""Checkpoints: immutable folders of safetensors and a state.json, whole or absent whatever kills the run."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from common import dist, shard
from common.config import UserError
from common.weights import check_names, check_shapes, read_json, read_tensors

NAME = re.compile(r"(epoch|step)_\d+$")
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
LINKS = ("last", "best")


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of `module` holds: parameters that train, and persistent buffers."""
    persistent = module.state_dict()
    state = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return state | {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def save(
    root: Path,
    name: str,
    module: nn.Module,
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    extra: dict[str, bytes],
    links: Sequence[str] = ("last",),
    keep: int = 0,
    spare: Sequence[str] = (),
    parts: Path | None = None,
) -> Path:
    """Writes root/name with `extra` small files, points the `links` at it, prunes all but `spare` and `keep` newest.

    The folder is filled under a temporary name, synced and renamed; links are replaced in one call. An error (a full
    disk) leaves earlier checkpoints as they were. Another checkpoint of the same name moves to root/superseded/.
    `parts`: what save_parts() wrote of module and optimizer, which moves into the checkpoint.
    """
    final, temporary = root / name, root / f".tmp-{name}-{os.getpid()}"
    record = json.dumps(state, indent=1)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # the same step of the same run may ask twice: a stop right after an epoch's end
        if not (final / STATE).is_file() or (final / STATE).read_text() != record:
            _fill(temporary, module, optimizer, extra | {STATE: record.encode()}, parts)
            if final.exists():  # the epochs of a resumed run got another length
                _set_aside(final)
            temporary.rename(final)
        for link in links:
            _link(root / link, name)
        _sync(root)
        if parts is not None:
            shutil.rmtree(parts, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        clean(root)
        raise _unsaved(final, error) from None
    if keep > 0:
        _prune(root, keep, spare)
    return final


def save_parts(
    root: Path, name: str, module: nn.Module, optimizer: dict[str, torch.Tensor], here: dist.Ranks
) -> Path:  # fmt: skip
    """Writes what the ranks hold of a sharded module and its optimiser's state to a folder in root, for save().

    All ranks call it. A full disk of one of them, or a root that not all of them see, is a UserError on every rank.
    """
    parts, final = root / f".tmp-parts-{name}", root / name

    def begin() -> None:
        shutil.rmtree(parts, ignore_errors=True)
        try:
            parts.mkdir(parents=True)
        except OSError as error:
            raise _unsaved(final, error) from None

    dist.main_first(here, begin)
    blind = dist.all_sum(not parts.is_dir(), device=here.device)[0]
    if blind:
        raise _unsaved(final, f"{blind:.0f} of {here.world} ranks do not see {root}, which must be on a shared disk")
    try:
        for file, tensors in ((MODEL, trainable_state(module)), (OPTIMIZER, optimizer)):
            shard.write(parts / Path(file).stem, tensors)
    except (OSError, SafetensorError) as error:
        dist.main_first(here, lambda: clean(root))
        raise _unsaved(final, error) from None
    return parts


def _unsaved(final: Path, error: object) -> UserError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
    reason = "no space left on the disk" if full else error
    return UserError(f"cannot save {final}: {reason}; earlier checkpoints are kept")


def _fill(
    folder: Path,
    module: nn.Module,
    optimizer: dict[str, torch.Tensor],
    files: dict[str, bytes],
    parts: Path | None,
) -> None:
    """Writes a checkpoint's files and waits until the disk has them."""
    shutil.rmtree(folder, ignore_errors=True)  # process ids come again
    folder.mkdir()
    for file, tensors in ((MODEL, trainable_state(module)), (OPTIMIZER, optimizer)):
        if parts is not None:
            (parts / Path(file).stem).rename(folder / Path(file).stem)
        else:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, folder / file)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _prune(root: Path, keep: int, names: Sequence[str]) -> None:
    """Deletes all but the newest `keep` checkpoints, the links' targets, `names`, and folders that the user named."""
    spare = {(root / name).resolve() for name in (*LINKS, *names)}
    ours = [path for path in checkpoints(root) if NAME.match(path.name)]
    for old in ours[:-keep]:
        if old.resolve() not in spare:
            trash = root / f".tmp-trash-{old.name}"
            with contextlib.suppress(OSError):  # a folder that stays is no reason to stop a run
                old.rename(trash)  # gone in one call; the slow part may be interrupted
                shutil.rmtree(trash)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(f".tmp-{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    if link.is_dir() and not link.is_symlink():  # the run was copied by something that knows no links
        _set_aside(link)
    os.replace(temporary, link)


def _set_aside(path: Path) -> None:
    """Moves a checkpoint to superseded/ beside it, under the first free name."""
    folder = path.parent / "superseded"
    folder.mkdir(exist_ok=True)
    names = (f"{path.name}.{number}" if number else path.name for number in itertools.count())
    path.rename(next(folder / name for name in names if not (folder / name).exists()))


def checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints in root under any name, oldest step first.

    Not the links, nor best_*: those hold weights only, of several epochs where several seeds train.
    """
    names = [path for path in root.glob("*") if not path.name.startswith((".", "best_")) and path.name not in LINKS]
    found = [path for path in names if (path / STATE).is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: (read_state(path)["step"], path.name))


def rewind(root: Path, state: dict[str, Any]) -> list[str]:
    """Going on from an older checkpoint: later ones move to root/superseded/, links to what the older one knew."""
    found = {path: read_state(path)["step"] for path in checkpoints(root)}
    later = [path for path, step in found.items() if step > state["step"]]
    here = [path.name for path, step in found.items() if step == state["step"]]
    if here and (root / "last").resolve().name not in here:  # a kill may have come before the link, too
        _link(root / "last", here[0])
    if later:
        best = state.get("best", {}).get("checkpoint")
        if best and (root / best).exists():
            _link(root / "best", best)
        elif (root / "best").is_symlink():
            (root / "best").unlink()
        for path in reversed(later):
            _set_aside(path)
    return [path.name for path in later]


def clean(root: Path) -> None:
    """Removes what a killed save left behind."""
    for path in root.glob(".tmp-*"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def resolve(path: str | Path, prefer: str = "last") -> Path:
    """One checkpoint folder from a checkpoint, a checkpoints/ or a run folder (its `prefer` link, else the newest)."""
    path = Path(path)
    for folder in (path / "checkpoints", path):  # copies beside checkpoints/ do not count
        if (folder / STATE).is_file() and place(folder).exists():
            return folder.resolve()
        if (folder / prefer / STATE).is_file():
            return (folder / prefer).resolve()
        if found := newest(folder):
            return found.resolve()
    reason = "holds no checkpoint" if path.exists() else "not found"
    raise UserError(f"checkpoint {path}: {reason} (a run folder, its checkpoints/ or one checkpoint folder)")


def run_of(folder: Path) -> Path:
    """The run that a checkpoint folder belongs to; of a copy elsewhere, the folder it lies in."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent


def newest(root: Path) -> Path | None:
    """The furthest whole checkpoint in root: after a kill between a rename and its link, ahead of `last`."""
    found = checkpoints(root)
    if not found and (root / "last" / STATE).is_file():  # copied without the folder that it pointed to
        return root / "last"
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json."""
    state = read_json(folder / STATE)
    if not isinstance(state.get("step"), int):
        raise UserError(f"{folder / STATE}: no step, so this is no checkpoint of a run")
    return state


def place(folder: Path, file: str = MODEL) -> Path:
    """Where a checkpoint holds what belongs in `file`: that file, or the folder of parts that several ranks wrote."""
    parts = folder / Path(file).stem
    return parts if parts.is_dir() else folder / file


def read(folder: Path, file: str = MODEL) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint's MODEL or OPTIMIZER; those in parts are put together when they are asked for."""
    found = place(folder, file)
    return shard.Parts(found) if found.is_dir() else read_tensors(found)


def load_model(module: nn.Module, folder: Path) -> str:
    """Loads a checkpoint into what trains in `module`, strictly; returns the coverage ("128/128 LoRA tensors")."""
    return load_tensors(module, read(folder), str(place(folder)))


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> str:
    """Copies `tensors` over trainable_state(module); UserError unless names and shapes are the same."""
    own = trainable_state(module)
    check_names(where, own, tensors)
    check_shapes(where, own, shard.shapes(tensors))
    for name, value in tensors.items():
        shard.fill(own[name], value)
    return coverage(list(tensors), list(own))


def coverage(loaded: list[str], own: list[str]) -> str:
    """What of `own` is in `loaded`, by part of the model: "128/128 LoRA tensors, 8/8 projection tensors"."""
    kinds = {"LoRA": "lora_", "projection": "projections."}
    parts = []
    for kind, mark in (*kinds.items(), ("other", "")):
        ours = [n for n in own if (mark in n if mark else not any(m in n for m in kinds.values()))]
        if ours:
            kind = "" if kind == "other" and len(ours) == len(own) else kind
            parts.append(f"{len(set(ours) & set(loaded))}/{len(ours)} {kind} tensors".replace("  ", " "))
    return ", ".join(parts)


def commit() -> str:
    """Git commit of the code, "" outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git here
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return ""


class RunLock:
    """Holds out/.lock while a run uses the folder; a lock whose process is gone is taken over."""

    def __init__(self, out: Path) -> None:
        self.path = out / ".lock"
        try:
            out.mkdir(parents=True, exist_ok=True)
            with _alone(out):
                self._take()
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}") from None

    def _take(self) -> None:
        try:
            with open(self.path, "x") as file:
                json.dump(_me(), file)
        except FileExistsError:
            holder = self._holder()
            # a holder of this very number: an earlier run of this process, or one of a container that started again
            if holder and holder != _me() and (holder["host"] != socket.gethostname() or _alive(holder["pid"])):
                raise UserError(
                    f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']}; "
                    f"choose another --out, or delete {self.path} if that process is gone"
                ) from None
            self.path.unlink(missing_ok=True)  # stale, or empty: killed between creating and writing it
            self._take()

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None

    def release(self) -> None:
        """Gives the folder back; does nothing in another process than the holder."""
        if self._holder() == _me():
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time, so that two that find a stale lock do not both take it over."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended but that its parent has not asked for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # no /proc, or gone by now
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
