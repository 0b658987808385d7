"""Checkpoints: immutable folders of safetensors and a state.json, whole or absent whatever kills the run."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from common.config import UserError

NAME = re.compile(r"(epoch|step)_\d+$")
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of `module` holds: parameters that train, and buffers."""
    state = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return state | dict(module.named_buffers())


def save(
    root: Path,
    name: str,
    module: nn.Module,
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
    extra: dict[str, bytes],
    best: bool,
    keep: int = 0,
) -> Path:
    """Writes root/name with `extra` small files, points `last` (and `best`) at it, deletes all but the newest `keep`.

    The folder is filled under a temporary name, synced and renamed; links are replaced in one call. An error (a full
    disk) leaves earlier checkpoints as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / name, root / f".tmp-{name}-{os.getpid()}"
    if not final.exists():  # the same step of the same run may ask twice: a stop right after an epoch's end
        try:
            temporary.mkdir()
            tensors = {key: value.contiguous().cpu() for key, value in trainable_state(module).items()}
            save_file(tensors, temporary / MODEL)
            save_file(optimizer, temporary / OPTIMIZER)
            for file, content in extra.items():
                (temporary / file).write_bytes(content)
            (temporary / STATE).write_text(json.dumps(state, indent=1))
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            temporary.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
            reason = "no space left on the disk" if full else error
            raise UserError(f"cannot save {final}: {reason}; earlier checkpoints are kept") from None
    _link(root / "last", name)
    if best:
        _link(root / "best", name)
    _sync(root)
    if keep > 0:
        spare = {os.readlink(root / link) for link in ("last", "best") if (root / link).is_symlink()}
        for old in checkpoints(root)[:-keep]:
            if old.name not in spare:
                trash = root / f".tmp-trash-{old.name}"
                old.rename(trash)  # gone in one call; the slow part may be interrupted
                shutil.rmtree(trash, ignore_errors=True)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(f".tmp-{link.name}-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    os.replace(temporary, link)


def checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints in root, oldest step first."""
    found = [path for path in root.glob("*_*") if NAME.match(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: (read_state(path)["step"], path.name))


def rewind(root: Path, state: dict[str, Any], aside: str = "superseded") -> list[str]:
    """Going on from an older checkpoint: later ones move to root/superseded/, `last` and `best` point to what the older knew."""
    later = [path for path in checkpoints(root) if read_state(path)["step"] > state["step"]]
    if later:
        here = next(path.name for path in checkpoints(root) if read_state(path)["step"] == state["step"])
        _link(root / "last", here)
        best = state.get("best", {}).get("checkpoint")
        if best and (root / best).exists():
            _link(root / "best", best)
        elif (root / "best").is_symlink():
            (root / "best").unlink()
        (root / aside).mkdir(exist_ok=True)
        for path in later:
            number = sum(1 for other in (root / aside).glob(f"{path.name}*"))
            path.rename(root / aside / (f"{path.name}.{number}" if number else path.name))
    return [path.name for path in later]


def clean(root: Path) -> None:
    """Removes what a killed save left behind."""
    for path in root.glob(".tmp-*"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def resolve(path: str | Path, prefer: str = "last") -> Path:
    """One checkpoint folder from a checkpoint, a checkpoints/ folder or a run folder (its `prefer` link, else the newest)."""
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / STATE).is_file() and (folder / MODEL).is_file():
            return folder.resolve()
        if (folder / prefer / STATE).is_file():
            return (folder / prefer).resolve()
        if folder.is_dir() and checkpoints(folder):
            return checkpoints(folder)[-1].resolve()
    reason = "holds no checkpoint" if path.exists() else "not found"
    raise UserError(f"checkpoint {path}: {reason} (a run folder, its checkpoints/ or one checkpoint folder)")


def newest(root: Path) -> Path | None:
    """The furthest whole checkpoint in root: after a kill between a rename and its link, ahead of `last`."""
    found = checkpoints(root) if root.is_dir() else []
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {folder}: {STATE} cannot be read ({error})") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file, memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def load_model(module: nn.Module, folder: Path) -> str:
    """Loads model.safetensors into what trains in `module`, strictly; returns the coverage, such as "128/128 LoRA tensors"."""
    return load_tensors(module, read_tensors(folder / MODEL), str(folder / MODEL))


def load_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> str:
    """Copies `tensors` over trainable_state(module): same names, same shapes, or a UserError that names the difference."""
    own = trainable_state(module)
    for problem, names in (
        ("missing", [name for name in own if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in own]),
        ("wrong shape", [n for n, value in tensors.items() if n in own and value.shape != own[n].shape]),
    ):
        if names:
            shown = ", ".join(
                f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}" if problem == "wrong shape" else name
                for name in names[:3]
            )
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{where}: {len(names)} {problem} tensors: {shown}{more}; nothing was loaded")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    return coverage(list(tensors), list(own))


def coverage(loaded: list[str], own: list[str]) -> str:
    """"128/128 LoRA tensors, 8/8 projection tensors": what of `own` is in `loaded`, by part of the model."""
    kinds = {"LoRA": "lora_", "projection": "projections."}
    parts = []
    for kind, mark in (*kinds.items(), ("other", "")):
        ours = [n for n in own if (mark in n if mark else not any(m in n for m in kinds.values()))]
        if ours:
            parts.append(f"{len(set(ours) & set(loaded))}/{len(ours)} {kind} tensors")
    return ", ".join(parts)


def commit() -> str:
    """Git commit of the code, "" outside a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


class RunLock:
    """Holds out/.lock while a run uses the folder; a lock whose process is gone is taken over."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / ".lock"
        mine = {"host": socket.gethostname(), "pid": os.getpid()}
        for _ in range(2):
            try:
                with open(self.path, "x") as file:
                    json.dump(mine, file)
                return
            except FileExistsError:
                holder = self._holder()
                if holder and holder["host"] == mine["host"] and not _alive(holder["pid"]):
                    self.path.unlink(missing_ok=True)
                elif holder:
                    raise UserError(
                        f"{out} is in use by process {holder['pid']} on {holder['host']}; "
                        f"choose another --out, or delete {self.path} if that process is gone"
                    ) from None
                else:
                    self.path.unlink(missing_ok=True)  # empty: killed between creating and writing it

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            return None

    def release(self) -> None:
        self.path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
