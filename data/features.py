"""Feature stores: one tensor a clip, written once in safetensors shards and read by id through mmap."""

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.config import UserError
from data.manifest import Clip
from data.media import MediaError, NoAudio, NoText, NoVideo, load_audio, load_frame, load_frames

SHARD_BYTES = 256 * 2**20


class Store:
    """What every feature store answers: `store[id]`, `id in store`, len, ids, dim and info."""

    def __init__(self, folder: Path, info: dict[str, Any], dim: int) -> None:
        self.folder, self.info, self.dim = folder, info, dim
        self._rows: dict[str, Any] = {}

    @property
    def ids(self) -> list[str]:
        return list(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: object) -> bool:
        return id in self._rows

    def __getitem__(self, id: str) -> Tensor:
        raise NotImplementedError  # each layout reads its own files

    def length(self, id: str) -> float | None:
        """How long a clip is, in seconds of sound or in tokens; None where its store does not say."""
        return None

    def take(self, ids: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """The frames of many clips in pieces (n, D), in the clips' order, and how many frames each has."""
        dense = self.info.get("kind") != "ids"  # ids of a clip are (T,), not one row of width T
        parts = [torch.atleast_2d(self[id]) if dense else self[id] for id in ids]
        return parts, [len(part) for part in parts]

    def check(self, ids: Iterable[str] | None = None) -> None:
        """Raise UserError at the first clip with a NaN or infinite value; reading by id does not look for them."""
        for id in self.ids if ids is None else ids:
            wrong = int((~torch.isfinite(self[id])).sum())
            if wrong:
                raise UserError(f"{self.folder}: id '{id}' has {wrong} non-finite values")


class FeatureStore(Store):
    """A folder of extract.py: shards of fixed rows or ragged sequences, and index.json over them."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            info = json.loads((folder / "index.json").read_text())
            # how features were made is what is left, and goes into checkpoints
            shards, ids = info.pop("shards"), info.pop("ids")
            super().__init__(folder, info, info["dim"])
            self._files = list(shards)
            # id -> (shard, row): 1,440 or 100,000 of them, never a read of the shards themselves
            for shard, count in enumerate(shards.values()):
                first = len(self._rows)
                self._rows |= {id: (shard, row) for row, id in enumerate(ids[first : first + count])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'index.json'}: not the index of a feature store ({error})") from None
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __getitem__(self, id: str) -> Tensor:
        """The features of a clip, (D,) or (T, D) or (T,) ids, as they were added."""
        shard, row = self._rows[id]
        tensors = self._shards.get(shard) or self._open(shard)
        if "rows" in tensors:
            return tensors["rows"][row].clone()
        first, last = tensors["offsets"][row : row + 2].tolist()
        return tensors["values"][first:last].clone()

    def length(self, id: str) -> float | None:
        """How long a clip is, in seconds of sound or in tokens; None where it was added without."""
        shard, row = self._rows[id]
        lengths = (self._shards.get(shard) or self._open(shard)).get("lengths")
        value = math.nan if lengths is None else lengths[row].item()
        return None if math.isnan(value) else value

    def take(self, ids: Sequence[str]) -> tuple[list[Tensor], list[int]]:
        """The frames of many clips in pieces (n, D), one for neighbours in a shard, and how many frames each has."""
        parts: list[Tensor] = []
        lengths: list[int] = []
        ids_ = self.info.get("kind") == "ids"  # a clip is (T,), not one row of width T
        run: list[int] = []  # shard, first and last row of the piece at hand

        def read() -> None:
            if run:
                tensors = self._shards.get(run[0]) or self._open(run[0])
                if "rows" in tensors:
                    rows = tensors["rows"][run[1] : run[2]]
                    size = 1 if rows.ndim == 2 and not ids_ else rows.shape[1]
                    parts.append(rows.flatten() if ids_ else rows.reshape(-1, rows.shape[-1]))
                    lengths.extend([size] * len(rows))
                else:
                    at = tensors["offsets"][run[1] : run[2] + 1]
                    parts.append(tensors["values"][at[0] : at[-1]])
                    lengths.extend(at.diff().tolist())

        for id in ids:
            shard, row = self._rows[id]
            if run and (shard, row) == (run[0], run[2]):
                run[2] += 1
            else:
                read()
                run = [shard, row, row + 1]
        read()
        return parts, lengths

    def _open(self, shard: int) -> dict[str, Tensor]:
        """The tensors of a shard, mapped: only the pages of rows that are asked for are read."""
        path = self.folder / self._files[shard]
        try:
            with safe_open(path, framework="pt") as file:
                self._shards[shard] = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable shard ({error}); --overwrite makes the store again") from None
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # a worker process maps the files itself


class NpyFolder(Store):
    """The layout of MER2023's features: <folder>/<id>.npy, one utterance vector (D,) or (1, D) each.

    Files of (T, D) are refused, for Emotion-LLaMA's loader takes their first row for the clip, unless pooling is "mean"
    (over T) or "frames" (as they are).
    """

    def __init__(self, folder: str | Path, pooling: str | None = None) -> None:
        folder = Path(folder)
        files = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".npy"))
        if not files:
            raise UserError(f"{folder}: holds no .npy files")
        super().__init__(folder, {}, 0)
        self.pooling = pooling
        self._rows = {name.removesuffix(".npy"): folder / name for name in files}
        first = self._read(self.ids[0])
        self.dim = first.shape[-1]
        self.info = {"encoder": folder.name, "dim": self.dim, "dtype": str(first.dtype), "pooling": pooling}

    def __getitem__(self, id: str) -> Tensor:
        """The features of a clip, (D,) float32; (T, D) with pooling "frames"."""
        array = self._read(id)
        if array.shape[-1] != self.dim:
            raise UserError(f"{self.folder}: id '{id}' has width {array.shape[-1]}, '{self.ids[0]}' has {self.dim}")
        return torch.from_numpy(array.astype(np.float32))

    def _read(self, id: str) -> np.ndarray:
        where = f"{self.folder}: id '{id}'"
        try:
            array = np.load(self._rows[id], allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{where} is not a readable .npy array ({error})") from None
        if array.ndim not in (1, 2) or not array.size or array.dtype.kind not in "fiu":
            raise UserError(f"{where} has shape {array.shape} of {array.dtype}, expected numbers (D,) or (T, D)")
        array = np.atleast_2d(array)
        if self.pooling == "frames":
            return array
        if len(array) > 1 and self.pooling != "mean":
            raise UserError(f"{where} has {len(array)} rows, expected one utterance vector (or pooling mean or frames)")
        return array.mean(0) if len(array) > 1 else array[0]


class Memory(Store):
    """Features at hand, by id; of kind "ids" (T,), else frames (T, dim)."""

    def __init__(self, values: dict[str, Tensor], dim: int, kind: str) -> None:
        super().__init__(Path(), {"kind": kind, "dim": dim}, dim)
        self._rows = values

    def __getitem__(self, id: str) -> Tensor:
        return self._rows[id]


def is_store(folder: Path) -> bool:
    """Whether a folder holds features; beside a manifest it may hold the sound or the videos themselves."""
    return (folder / "index.json").is_file() or any(folder.glob("*.npy"))


def open_features(path: str | Path, pooling: str | None = None) -> FeatureStore | NpyFolder:
    """The store at `path` or features/`path`, whichever layout it has; `pooling` is for .npy files of many rows."""
    places = list(dict.fromkeys([Path(path), Path("features", path)]))
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        looked = " nor ".join(map(str, places))
        raise UserError(f"features not found: neither {looked} is a folder (extract.py makes one)")
    if (folder / "index.json").is_file():
        return FeatureStore(folder)
    if shard_files(folder) or (folder / "plan.json").is_file():
        raise UserError(f"{folder}: extraction is unfinished; continue it with extract.py --out {folder} --resume")
    return NpyFolder(folder, pooling)


@dataclass
class Shard:
    """What the header of a shard says: whose clips it has, how they were made, and which of its clips failed."""

    path: Path
    number: int  # -1: written before shards were numbered in one row
    ids: list[str]
    info: dict[str, Any]
    skipped: dict[str, tuple[str, bool]]  # id -> why it has no features, and whether that is damage


class StoreWriter:
    """Writes a store in whole shards, each with its ids, so that a restart knows what is done."""

    def __init__(self, folder: str | Path, info: Mapping[str, Any], shard_rows: int = 4096) -> None:
        self.folder, self.shard_rows = Path(folder), shard_rows
        self.info: dict[str, Any] = json.loads(json.dumps(info))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards = list(read_shards(self.folder))
        for made in (shard.info for shard in self.shards):
            changed = [key for key in {**made, **self.info} if made.get(key) != self.info.get(key)]
            if changed:
                old, new = made.get(changed[0]), self.info.get(changed[0])
                raise UserError(f"{folder}: extracted with {changed[0]} {old}, now {new}; --overwrite starts again")
        self.done = {id for shard in self.shards for id in shard.ids}
        self.next = 1 + max((shard.number for shard in self.shards), default=-1)
        self._restart()

    def _restart(self) -> None:
        self._ids: list[str] = []
        self._tensors: list[Tensor] = []
        self._lengths: list[float | None] = []
        self._bytes = 0

    def add(self, id: str, tensor: Tensor, length: float | None = None) -> None:
        """Take one clip's features; they are on disk when their shard is full or closed.

        `length`: how long the clip is, in seconds of sound or in tokens.
        """
        self._ids.append(id)
        self._tensors.append(tensor.detach().cpu())
        self._lengths.append(length)
        self._bytes += tensor.nbytes
        if len(self._ids) >= self.shard_rows or self._bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is pending as one shard, in whole or not at all."""
        if self._ids:
            self.write(self.next, self._ids, self._tensors, self._lengths)
            self.next += 1
        self._restart()

    def write(
        self, number: int, ids: Sequence[str], values: Sequence[Tensor], lengths: Sequence[float | None],
        skipped: Mapping[str, tuple[str, bool]] | None = None,
    ) -> None:  # fmt: skip
        """Write the shard with this number, in whole or not at all; `skipped` are its clips without features."""
        if len({value.shape for value in values}) > 1:
            sizes = torch.tensor([0, *map(len, values)])
            tensors = {"values": torch.cat(list(values)), "offsets": sizes.cumsum(0)}
        else:
            tensors = {"rows": torch.stack(list(values))} if ids else {}
        if not all(length is None for length in lengths):
            known = [math.nan if length is None else length for length in lengths]
            tensors["lengths"] = torch.tensor(known, dtype=torch.float32)
        header = {"ids": list(ids), "info": self.info} | ({"skipped": dict(skipped)} if skipped else {})
        path = self.folder / f"shard-{number:05d}.safetensors"
        # save_file would make the file readable for its owner only; several entries would come in any order
        replace_file(path, save(tensors, {"shard": json.dumps(header)}))
        self.done.update(ids)

    def finish(self) -> int:
        """Write index.json over all shards, which makes the folder a store; returns the number of clips."""
        self.close()
        shards = list(read_shards(self.folder))
        ids = [id for shard in shards for id in shard.ids]
        index = {**self.info, "shards": {shard.path.name: len(shard.ids) for shard in shards}, "ids": ids}
        replace_file(self.folder / "index.json", json.dumps(index).encode())
        return len(ids)


def write_npy(store: Store, folder: str | Path) -> None:
    """The features of every clip as <folder>/<id>.npy, the layout of MER2023 that NpyFolder reads."""
    folder = Path(folder)
    odd = next((id for id in store.ids if id != Path(id).name), None)
    if odd is not None:
        raise UserError(f"{folder}: id '{odd}' is no file name")
    folder.mkdir(parents=True, exist_ok=True)
    for id in store.ids:
        buffer = io.BytesIO()
        np.save(buffer, store[id].numpy())
        replace_file(folder / f"{id}.npy", buffer.getvalue(), sync=False)


def shard_files(folder: str | Path) -> list[Path]:
    """The finished shards in a folder, in order; those of the time when each rank had its own numbers come first."""
    return sorted(Path(folder).glob("shard-*.safetensors"), key=lambda path: (-path.name.count("-"), path.name))


def read_shards(folder: Path) -> Iterator[Shard]:
    """The headers of the finished shards in a folder, in order."""
    for path in shard_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            if "shard" in metadata:
                header = json.loads(metadata["shard"])
                number = int(path.stem.split("-")[1])
                skipped = {id: (reason, bad) for id, (reason, bad) in header.get("skipped", {}).items()}
                yield Shard(path, number, header["ids"], header["info"], skipped)
            else:
                yield Shard(path, -1, json.loads(metadata["ids"]), json.loads(metadata["info"]), {})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a readable shard ({error}); delete it and --resume") from None


def replace_file(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file; after a power cut (`sync`) or a kill it is whole, or as it was before."""
    partial = path.with_suffix(".tmp")
    partial.write_bytes(content)
    if sync:
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    os.replace(partial, path)


def decode_clip(clip: Clip, encoder: Any, pooling: str, frame: str | float = "middle") -> Any:
    """What `encoder` reads of a clip: waveform (T,), frames (n, H, W, 3) or text; MediaError, Absent without any.

    `frame` says which frame stands for a clip where one does: first, middle, peak (middle where no peak is known), or
    its time in [0, 1). Of frames only the clip's box is left, where it has one.
    """
    if encoder.modality == "text":
        if not (clip.text or "").strip():
            raise NoText(f"{clip.id}: no text")
        return clip.text
    if clip.path is None:
        raise (NoAudio if encoder.modality == "audio" else NoVideo)(f"{clip.id}: no media file")
    if encoder.modality == "audio":
        return load_audio(clip.path, encoder.sample_rate, clip.start, clip.end)
    count = encoder.frames(pooling)
    if count > 1:
        frames = load_frames(clip.path, count, start=clip.start, end=clip.end)
    else:
        which = frame if frame != "peak" else "middle" if clip.frame is None else clip.frame
        frames = load_frame(clip.path, which, clip.start, clip.end)[None]
    return frames if clip.box is None else _crop(frames, clip)


def _crop(frames: Tensor, clip: Clip) -> Tensor:
    """The part of frames (n, H, W, 3) inside the clip's box, as far as it lies on them."""
    left, top, right, bottom = (max(round(float(edge)), 0) for edge in str(clip.box).split(","))
    part = frames[:, top:bottom, left:right]
    if not part.numel():
        raise MediaError(f"{clip.path}: box {clip.box} is outside the {frames.shape[2]} x {frames.shape[1]} frame")
    return part


@torch.inference_mode()
def encode_clip(clip: Clip, encoder: Any, pooling: str, frame: str | float = "middle") -> Tensor:
    """The features of one clip, decoded, encoded and pooled; MediaError where that cannot be done."""
    return encoder.encode(decode_clip(clip, encoder, pooling, frame), pooling)
