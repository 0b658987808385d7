"""Pretrained weights on disk: where they are, what they are, and a strict load of safetensors into a module."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.config import UserError

BLOCK, BLOCKS = 4096, 64
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
GATED = ("meta-llama/", "google/gemma", "google/embeddinggemma")  # hub names that need a licence accepted


def find_weights(name: str | os.PathLike, what: str = "weights") -> Path:
    """The folder of `name`: a path as it is, then weights/<name>, weights/<last part>, then the Hugging Face cache."""
    name = os.fspath(name)
    places = list(dict.fromkeys([Path(name).expanduser(), Path("weights", name), Path("weights", Path(name).name)]))
    hub = _is_hub_name(name)
    for folder in places + (_snapshots(name) if hub else []):
        if folder.is_dir():
            return folder
    looked = [str(place) for place in places] + ([str(_cache())] if hub else [])
    message = f"{what} '{name}' not found (looked in {', '.join(looked)})"
    if hub:
        message += f"; get them with: hf download {name} --local-dir weights/{name}"
    if name.startswith(GATED):
        message += " (gated: accept the licence first)"
    raise UserError(message)


def locate(given: str, what: str) -> Path:
    """A weight file where it is given or below weights/, or the folder that find_weights() finds."""
    places = (Path(given).expanduser(), Path("weights", given))
    return next((place for place in places if place.is_file()), None) or find_weights(given, what)


def _is_hub_name(name: str) -> bool:
    owner, _, model = name.partition("/")
    return bool(owner and model) and "/" not in model and not name.startswith((".", "~", "weights/"))


def _cache() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _snapshots(name: str) -> list[Path]:
    """Snapshots of a hub name in the Hugging Face cache: ref main first, then the newest."""
    repo = _cache() / f"models--{name.replace('/', '--')}"
    folders = sorted((repo / "snapshots").glob("*/"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    main = repo / "refs" / "main"
    return [repo / "snapshots" / main.read_text().strip(), *folders] if main.is_file() else folders


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object; UserError if there is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def tensor_files(folder: str | os.PathLike) -> dict[str, Path]:
    """Tensor name -> file, of a sharded or a single-file folder, as model_files() finds them. Reads headers only."""
    return {name: file for file in model_files(folder) for name in _open(file).keys()}


def model_files(folder: str | os.PathLike, wanted: Callable[[str], Any] | None = None) -> list[Path]:
    """The files of a sharded or a single-file folder: its safetensors, or PyTorch's where it has none.

    Of a sharded one only those with a tensor whose name is `wanted`.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        files = _model_files(Path(folder), single, wanted)
        if files is not None:
            return files
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin, nor an index of either")


def _model_files(folder: Path, single: str, wanted: Callable[[str], Any] | None = None) -> list[Path] | None:
    index = folder / f"{single}.index.json"
    if index.is_file():
        names = read_json(index)["weight_map"].items()
        files = sorted({folder / file for name, file in names if wanted is None or wanted(name)})
    elif (folder / single).is_file():
        files = [folder / single]
    else:
        return None
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, but {index.name} names it")
    return files


def read_folder(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """All tensors of a sharded or a single-file folder."""
    return {name: tensor for file in model_files(folder) for name, tensor in read_tensors(file).items()}


class TorchFile:
    """A torch file, by the methods of an open safetensors file: tensors stay on the disk until they are used."""

    def __init__(self, file: Path) -> None:
        self.tensors = read_tensors(file, mapped=True)
        self.keys, self.get_tensor = self.tensors.keys, self.tensors.__getitem__

    def get_slice(self, name: str) -> SimpleNamespace:
        """What tells the shape."""
        return SimpleNamespace(get_shape=lambda: self.tensors[name].shape)


def _open(file: Path):
    return open_tensors(file) if file.suffix == ".safetensors" else TorchFile(file)


def open_tensors(file: Path):
    """A safetensors file, of which only the header is read; UserError where it is none."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None


def read_tensors(
    file: str | os.PathLike, entry: str = "model", nested: bool = False, mapped: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors or torch file, of its `entry` if it is a training checkpoint.

    With `nested` those of dicts inside count too, as "dict.name". With `mapped` those of a torch file are not read yet.
    """
    file = Path(file)
    if file.suffix == ".safetensors":
        shard = open_tensors(file)
        return {name: shard.get_tensor(name) for name in shard.keys()}
    state = read_state(file, mapped)
    state = state.get(entry, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise UserError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    return {name: tensor for name, tensor in _flat(state, nested) if torch.is_tensor(tensor)}


def read_state(file: str | os.PathLike, mapped: bool = False) -> Any:
    """What a torch file holds, if it is tensors, numbers, text and containers of these only."""
    try:
        with torch.serialization.safe_globals(_scalars()):  # trainers keep NumPy scores beside their weights
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: not readable as tensors only ({str(error).splitlines()[0]})") from None


def _flat(state: dict, nested: bool) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if nested and isinstance(value, dict):
            yield from ((f"{name}.{inner}", part) for inner, part in _flat(value, True))
        else:
            yield name, value


def _scalars() -> list:
    """What a pickled NumPy number is made of; it runs no code."""
    import numpy as np

    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "b1")]
    scalar = np.float64(0).__reduce__()[0]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def load_strict(
    module: nn.Module,
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: tuple[str, ...] = (),
    then: Callable[[str], None] | None = None,
    rename: Callable[[str], str] = str,
    mapped: bool = False,
    aside: tuple[str, ...] = (),
) -> str:
    """Give `module` (may be on meta) a folder's tensors, one at a time, straight to dtype and device.

    Names ending in one of `ignore` are left out on both sides, and a file's that begin with one of `aside`, parts of
    another model; a missing, unexpected or misshapen one is a UserError.
    `then` is called with the name of each tensor that has found its place; `rename` gives the module's name for a
    file's. With `mapped` tensors that need no change stay in their files, whose pages all processes of a machine share.
    Returns the coverage ("291/291 tensors, 32 not used, left aside: 58 of model.vision_tower").
    """
    every = {rename(name): (name, file) for name, file in tensor_files(folder).items()}
    given = {ours: place for ours, place in every.items() if not ours.startswith(aside)}
    found = {ours: place for ours, place in given.items() if not ours.endswith(ignore)}
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(ignore)}
    check_names(folder, wanted, found)
    shards = {file: _open(file) for file in sorted({file for _, file in found.values()})}
    shapes = {ours: tuple(shards[file].get_slice(name).get_shape()) for ours, (name, file) in found.items()}
    check_shapes(folder, wanted, shapes)
    for file in list(shards):
        shard = shards.pop(file)  # unmapped when done, so the host holds one shard at most
        for ours, name in ((ours, found[ours][0]) for ours in wanted if found[ours][1] == file):
            tensor = shard.get_tensor(name)
            _assign(module, ours, tensor.to(device, dtype if tensor.is_floating_point() else None, copy=not mapped))
            if then is not None:
                then(ours)
    unused = f", {len(given) - len(found)} not used" if len(given) > len(found) else ""
    counts = {part.strip("."): sum(ours.startswith(part) for ours in every) for part in aside}
    left = ", ".join(f"{count} of {part}" for part, count in counts.items() if count)
    apart = f", left aside: {left}" if left else ""
    return f"{len(found)}/{len(wanted)} tensors{unused}{apart}"


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)


def check_names(where: object, wanted: Iterable[str], found: Iterable[str]) -> None:
    """UserError unless both hold the same names."""
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    problems = [f"{len(missing)} missing: {_first(missing)}"] * bool(missing)
    problems += [f"{len(unexpected)} unexpected: {_first(unexpected)}"] * bool(unexpected)
    if problems:
        matched = f"{len(set(wanted) & set(found))}/{len(set(wanted))}"
        raise UserError(f"{where}: {matched} tensors match the model; {'; '.join(problems)}")


def check_shapes(where: object, wanted: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple]) -> None:
    """UserError unless every wanted tensor is found in its shape."""
    pairs = [(name, tuple(tensor.shape), shapes[name]) for name, tensor in wanted.items()]
    wrong = [f"{name} is {found}, not {shape}" for name, shape, found in pairs if found != shape]
    if wrong:
        raise UserError(f"{where}: {len(wrong)} tensors of the wrong shape: {_first(wrong)}")


def _first(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def weight_files(path: str | os.PathLike) -> Iterator[Path]:
    """The weight files of a folder (safetensors if there are any), or the one file given, in order."""
    path = Path(path)
    if path.is_file():
        yield path
        return
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    yield from [file for file in files if file.suffix == ".safetensors"] or files


def identity(path: str | os.PathLike) -> dict:
    """What tells these weights from others without reading them whole.

    Name, and per file: size, sha256 of the safetensors header, sha256 of 64 evenly spaced 4 KiB blocks.
    """
    return {"name": _name(Path(path)), "files": {file.name: _fingerprint(file) for file in weight_files(path)}}


def _name(path: Path) -> str:
    """Hub name where the path shows one (weights/<hub name>, the cache's models--org--name), else its last part."""
    parts = list(path.absolute().parts)
    for part in parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return "/".join(parts[-2:]) if len(parts) > 2 and parts[-3] == "weights" else parts[-1]


def _fingerprint(file: Path) -> dict:
    size = file.stat().st_size
    with open(file, "rb") as f:
        header = f.read(8 + int.from_bytes(f.read(8), "little")) if file.suffix == ".safetensors" else b""
        blocks = hashlib.sha256()
        for i in range(BLOCKS):
            f.seek(max(size - BLOCK, 0) * i // (BLOCKS - 1))
            blocks.update(f.read(BLOCK))
    return {"size": size, "header_sha256": hashlib.sha256(header).hexdigest(), "blocks_sha256": blocks.hexdigest()}


def full_sha256(path: str | os.PathLike) -> dict[str, str]:
    """File name -> sha256 of the whole file."""
    digests = {}
    for file in weight_files(path):
        with open(file, "rb") as f:
            digests[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return digests
