"""Decoding of audio, video and still images: mono waveforms and RGB frames. The only module that touches codecs.

A path may go on below a tar: clips.tar/a.mp3 is decoded from its place in there, nothing is unpacked.
"""

import functools
import io
import math
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

SAMPLE_RATE = 16000
SOUND_FILES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"}  # what libsndfile reads
SEEKABLE = {"mov", "matroska"}  # containers whose index leads exactly to a keyframe
PLAYLISTS = {"concat", "dash", "hls", "imf", "sdp"}  # formats that name other files, which nobody asked to open
PREROLL = 0.2  # seconds decoded ahead of a cut: lossy audio codecs overlap their blocks


class MediaError(Exception):
    """A file that cannot be decoded, as one line "path: reason"."""


class Absent(MediaError):
    """A sound clip without the wanted modality, which is normal and no damage."""


class NoAudio(Absent):
    """There is no audio track."""


class NoVideo(Absent):
    """There is no picture, cover art aside."""


class NoText(Absent):
    """There is no transcript."""


def load_audio(
    path: str | Path, sr: int = SAMPLE_RATE, start: float | None = None, end: float | None = None
) -> torch.Tensor:
    """Mono waveform (T,) float32 at `sr` Hz, all of it or the seconds start..end; MediaError or NoAudio without one."""
    path = present(path)
    sound = _read_sound_file(path, start, end) if path.suffix.lower() in SOUND_FILES else None
    samples, rate = sound or _read_audio_stream(path, start, end)
    if not len(samples):
        raise MediaError(f"{path}: no samples{_window(start, end)}")
    return samples if rate == sr else _resampler(rate, sr)(samples)


def load_frames(
    path: str | Path,
    n: int | None = None,
    indices: Sequence[int] | None = None,
    start: float | None = None,
    end: float | None = None,
    phase: float = 0.5,
) -> torch.Tensor:
    """Upright RGB frames (n, H, W, 3) uint8 on screen in n equal spans of time, or the frames `indices`.

    `phase`, in [0, 1), is the place in each span, 0.5 its centre. Seconds start..end bound both; a clip with fewer than
    n frames repeats them. A picture is a clip of one frame.
    """
    path = present(path)
    line = _timeline(path, start, end)
    if indices is None:
        span = (line.end - line.start) / (n or 1)
        marks = [line.start + (i + phase) * span for i in range(n or 1)]
        wanted = [line.times[bisect_right(line.times, mark) - 1] for mark in marks]
    else:
        shown = line.shown
        outside = [i for i in indices if not 0 <= i < len(shown)]
        if outside:
            raise MediaError(f"{path}: frame {outside[0]} of {len(shown)}{_window(start, end)}")
        wanted = [shown[i] for i in indices]
    frames = _frames_at(path, line, sorted(set(wanted)))
    return torch.stack([frames[time] for time in wanted])


def load_frame(
    path: str | Path, which: str | float = "first", start: float | None = None, end: float | None = None
) -> torch.Tensor:
    """One upright RGB frame (H, W, 3) uint8: "first", "middle" (in time), an index, or a float in [0, 1): its time."""
    if which == "middle" or isinstance(which, float):
        return load_frames(path, n=1, start=start, end=end, phase=0.5 if which == "middle" else which)[0]
    return load_frames(path, indices=[0 if which == "first" else int(which)], start=start, end=end)[0]


def count_frames(path: str | Path) -> int:
    """How many frames load_frames() has `indices` for, told without decoding one; MediaError or NoVideo without any."""
    return len(_timeline(present(path), None, None).shown)


def probe(path: str | Path) -> dict[str, Any]:
    """Duration (s), fps, frames, width, height (as stored), has_audio, has_video, sample_rate; None where unknown."""
    path = present(path)
    with _opened(path) as container:
        video, audio = _video_stream(container), _audio_stream(container)
        duration = container.duration and container.duration / 1e6
    return {
        "duration": duration,
        "fps": float(video.average_rate) if video and video.average_rate else None,
        "frames": (video.frames or len(_timeline(path, None, None).times)) if video else 0,
        "width": video.width if video else None,
        "height": video.height if video else None,
        "has_audio": audio is not None,
        "has_video": video is not None,
        "sample_rate": audio.sample_rate if audio else None,
    }


def seconds(path: str | Path, start: float | None = None, end: float | None = None) -> float | None:
    """How long a clip probably sounds, from its bounds or the head of its file; None where neither tells."""
    if start is not None and end is not None:
        return end - start
    try:
        path = present(path)
        whole = _sound_seconds(path) if path.suffix.lower() in SOUND_FILES else None
        if whole is None:
            with _opened(path) as container:
                whole = container.duration and container.duration / 1e6
    except MediaError:
        return None
    return whole and max((whole if end is None else min(end, whole)) - (start or 0), 0)


def length(path: str | Path) -> float:
    """Seconds to the end of a file's last packet, or to where its head says if that is later; decodes nothing."""
    with _opened(present(path)) as container:
        zero, said = (container.start_time or 0) / 1e6, (container.duration or 0) / 1e6
        timed = (packet for packet in container.demux() if packet.pts is not None)
        return max(said, *(float((p.pts + (p.duration or 0)) * p.time_base) - zero for p in timed), 0.0)


@functools.lru_cache(64)  # clips are mostly read tar by tar
def tar_index(path: str | Path) -> dict[str, tuple[int, int]]:
    """Name -> (offset, bytes) of the regular files in a tar that is not compressed; MediaError if it is damaged."""
    try:
        index = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:  # tarfile would step back and go round for ever
                    raise tarfile.ReadError(f"negative size at byte {member.offset}")
                if member.isreg() and not member.issparse():
                    index[PurePosixPath(member.name).as_posix()] = (member.offset_data, member.size)
        # tarfile takes anything that is no header for the end
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
        return index
    except (tarfile.TarError, OSError, ValueError) as error:
        raise MediaError(f"{path}: damaged tar ({error})") from None


def _member(path: Path) -> tuple[Path, int, int] | None:
    """(tar, offset, bytes) of a path below a tar; None for any other path, and for what the tar does not hold."""
    tar = next((above for above in path.parents if above.suffix.lower() == ".tar" and above.is_file()), None)
    place = tar and tar_index(tar).get(path.relative_to(tar).as_posix())
    return (tar, *place) if tar and place else None


def _source(path: Path) -> Path | io.BytesIO:
    """What a decoder opens: the path, or a tar's member in memory."""
    found = _member(path)
    if found is None:
        return path
    tar, offset, size = found
    try:
        with open(tar, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}") from None


def present(path: str | Path) -> Path:
    """The path, if there is a file with something in it; MediaError if not."""
    path = Path(path)
    found = _member(path)
    if found is None and not path.is_file():
        raise MediaError(f"{path}: {'is a folder' if path.is_dir() else 'not found'}")
    if not (found[2] if found else path.stat().st_size):
        raise MediaError(f"{path}: empty file")
    return path


def _window(start: float | None, end: float | None) -> str:
    if start is None and end is None:
        return ""
    return f" from {start or 0:g} s" + ("" if end is None else f" to {end:g} s")


@functools.lru_cache(8)
def _resampler(rate: int, sr: int) -> Any:
    from torchaudio.transforms import Resample

    return Resample(rate, sr)  # keeps its filter, which costs more than a short clip


def _read_sound_file(path: Path, start: float | None, end: float | None) -> tuple[torch.Tensor, int] | None:
    """Samples and rate by libsndfile; None for a file it does not know."""
    import soundfile

    try:
        with soundfile.SoundFile(_source(path)) as file:
            first = round((start or 0) * file.samplerate)
            last = file.frames if end is None else round(end * file.samplerate)
            file.seek(min(first, file.frames))
            samples = file.read(max(last - first, 0), dtype="float32", always_2d=True)  # (T, channels)
            return torch.from_numpy(samples).mean(1), file.samplerate
    except soundfile.LibsndfileError:
        return None


def _sound_seconds(path: Path) -> float | None:
    import soundfile

    try:
        return soundfile.info(_source(path)).duration
    except soundfile.LibsndfileError:
        return None


def _read_audio_stream(path: Path, start: float | None, end: float | None) -> tuple[torch.Tensor, int]:
    """Samples and rate of a container's first audio stream, by FFmpeg."""
    chunks: list[torch.Tensor] = []
    begin = rate = 0
    with _opened(path) as container:
        stream = _audio_stream(container)
        if stream is None:
            raise NoAudio(f"{path}: no audio stream")
        zero = (container.start_time or 0) / 1e6
        if start:
            container.seek(max(int((start + zero - PREROLL) * 1e6), 0))
        clock = 0.0
        for frame in _decoded(container, stream):
            clock = clock if frame.time is None else frame.time - zero
            if end is not None and clock >= end:
                break
            if not chunks:
                begin, rate = clock, frame.sample_rate
            chunks.append(_mono(frame))
            clock += frame.samples / frame.sample_rate
        declared = stream.duration and float(stream.duration * stream.time_base)
    samples = torch.cat(chunks) if chunks else torch.empty(0)
    if start is None and end is None and rate:
        _check_whole(path, len(samples) / rate, declared)
    first = max(round(((start or 0) - begin) * rate), 0)
    last = len(samples) if end is None else max(round((end - begin) * rate), 0)
    return samples[first:last], rate


def _mono(frame: Any) -> torch.Tensor:
    """Mean over the channels of a decoded audio frame, full scale +-1."""
    samples = torch.from_numpy(frame.to_ndarray())
    if not frame.format.is_planar:
        samples = samples.view(frame.samples, -1).T  # (1, T * channels) -> (channels, T)
    if samples.dtype == torch.uint8:
        return (samples.float() - 128).mean(0) / 128
    scale = 1 if samples.is_floating_point() else 2 ** (8 * samples.element_size() - 1)
    return samples.float().mean(0) / scale


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An FFmpeg container; what goes wrong inside the block becomes a MediaError."""
    import av
    from av.error import FFmpegError

    # "file:" and no pattern: a name is a name, be it "a:b.mp4" or "frame%03d.png"
    options = {"pattern_type": "none"} if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".bmp", ".webp"} else {}
    source = _source(path)
    try:
        file = f"file:{path}" if source is path else source
        with av.open(file, options=options, metadata_errors="replace") as container:
            if PLAYLISTS & set(container.format.name.split(",")):
                raise MediaError(f"{path}: a playlist, not a clip")
            yield container
    except (FFmpegError, ValueError) as error:  # ValueError: a format that PyAV has no array for
        raise MediaError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _audio_stream(container: Any) -> Any | None:
    return next((s for s in container.streams.audio if s.codec_context and s.sample_rate), None)


def _video_stream(container: Any) -> Any | None:
    """The first stream of moving pictures or the still of an image file; cover art is neither."""
    from av.stream import Disposition

    streams = container.streams.video
    return next((s for s in streams if s.codec_context and not s.disposition & Disposition.attached_pic), None)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; a damaged packet is passed over, as a player does."""
    from av.error import InvalidDataError

    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except InvalidDataError:
            continue


def _check_whole(path: Path, seconds: float, declared: float | None) -> None:
    if declared and seconds < declared / 2:
        raise MediaError(f"{path}: truncated, {seconds:.1f} s of {declared:.1f} s")


@dataclass
class _Timeline:
    """When the frames of a video stream are shown, in its ticks, and the window asked for."""

    times: list[int]
    keys: list[int]
    start: float
    end: float
    counted: bool  # the container stores no display times: the k-th frame out of the decoder is shown at tick k
    seekable: bool

    @property
    def shown(self) -> list[int]:
        """The times from `start` on."""
        return [time for time in self.times if time >= self.start]


def _timeline(path: Path, start: float | None, end: float | None) -> _Timeline:
    """The display times of all frames from `start` on, read from the packets without decoding any."""
    with _opened(path) as container:
        stream = _video_stream(container)
        if stream is None:
            raise NoVideo(f"{path}: no video stream")
        names = set(container.format.name.split(","))
        seekable = bool(SEEKABLE & names)
        tick, zero = float(stream.time_base), (container.start_time or 0) / 1e6
        if start and seekable:
            container.seek(int((start + zero) / tick), stream=stream)
        packets = []
        for packet in container.demux(stream):
            if end is not None and seekable and packet.dts is not None and packet.dts * tick - zero > end:
                break
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.is_keyframe, packet.duration or 0))
        declared = stream.duration and stream.duration * tick
        rate = float(stream.average_rate or 25)
    if not packets:
        raise MediaError(f"{path}: no frames{_window(start, end)}")
    # AVI keeps the order of decoding only, raw streams nothing: both run at a constant rate
    counted = "avi" in names or any(pts is None for pts, _, _ in packets)
    if counted:
        tick, zero = 1 / rate, 0.0
        packets = [(k, key, 1) for k, (_, key, _) in enumerate(packets)]
    packets.sort()
    times = [pts for pts, _, _ in packets]
    last = packets[-1][2] or (times[-1] - times[0]) / max(len(times) - 1, 1) or 1
    if start is None and end is None:
        _check_whole(path, (times[-1] + last - times[0]) * tick, declared)
    begin = max(times[0], ((start or 0) + zero) / tick)
    stop = times[-1] + last if end is None else min(times[-1] + last, (end + zero) / tick)
    if begin >= stop:
        raise MediaError(f"{path}: no frames{_window(start, end)}")
    return _Timeline(times, [pts for pts, key, _ in packets if key], begin, stop, counted, seekable)


def _frames_at(path: Path, line: _Timeline, wanted: list[int]) -> dict[int, torch.Tensor]:
    """The frames shown at the wanted times (ascending); groups of pictures in between are jumped over."""
    from av.video.reformatter import VideoReformatter

    found: dict[int, torch.Tensor] = {}
    to_rgb = VideoReformatter()  # setting up a conversion costs more than decoding a small frame: one for all
    with _opened(path) as container:
        stream = _video_stream(container)
        clock, frame, size = -math.inf, None, {}
        frames = _decoded(container, stream)
        order = iter(line.times)
        for want in wanted:
            key = line.keys[bisect_right(line.keys, want) - 1] if line.seekable and line.keys else -math.inf
            if key > clock:
                container.seek(int(key), stream=stream)
                frames = _decoded(container, stream)
            for frame in frames:
                clock = next(order, line.times[-1]) if line.counted else frame.pts
                if clock >= want:
                    break
            if frame is None:
                raise MediaError(f"{path}: no frame can be decoded")
            size = size or {"width": frame.width, "height": frame.height}  # a stream may change its size midway
            image = to_rgb.reformat(frame, format="rgb24", **size).to_ndarray()
            # the display matrix, or a picture's EXIF tag, says how far to turn it counterclockwise
            found[want] = torch.from_numpy(np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90))))
    return found
