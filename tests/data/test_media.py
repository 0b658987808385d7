"""Decoding of the odd files that real collections hold; all made here, the real ones only with EMOTORCH_DATA."""

import io
import os
import struct
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from data.media import (
    MediaError,
    NoAudio,
    NoVideo,
    length,
    load_audio,
    load_frame,
    load_frames,
    probe,
    seconds,
    tar_index,
)

W, H = 64, 48
SHARED = os.environ.get("EMOTORCH_DATA")


def grey(frames: torch.Tensor) -> list[int]:
    """Each frame's level, undone to the index that `make_video` painted."""
    return [round(level / 8) for level in frames[:, H // 2, W // 2].float().mean(-1).tolist()]


def make_video(path, count=10, times=None, codec="mpeg4", rotation=None, extra=(), audio=0.0, options=None, gop=None):
    """Frames of grey 8 * index with a white upper left corner, shown at `times` (ms) or 25 a second."""
    with av.open(str(path), "w") as container:
        streams = []
        for _ in range(1 + len(extra)):
            stream = container.add_stream(codec, rate=25, options=options or {})
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = W, H, "yuv420p", 4_000_000
            if gop:
                stream.codec_context.gop_size = gop
            streams.append(stream)
        if times:
            streams[0].time_base = streams[0].codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            streams[0].set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for stream, base in zip(streams, (0, *extra), strict=True):
            for i in range(count):
                image = np.full((H, W, 3), min(8 * (i + base), 255), np.uint8)
                image[:8, :8] = 255
                frame = av.VideoFrame.from_ndarray(image, "rgb24")
                frame.pts = times[i] if times else i
                frame.time_base = Fraction(1, 1000) if times else Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if sound:
            samples = np.sin(2 * np.pi * 440 * np.arange(int(audio * 16000)) / 16000).astype(np.float32)
            for first in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, first : first + 1024], "fltp", "mono")
                frame.sample_rate, frame.pts, frame.time_base = 16000, first, Fraction(1, 16000)
                container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return path


def pitch(samples: torch.Tensor, rate: int) -> float:
    return float(torch.fft.rfft(samples).abs().argmax()) * rate / len(samples)


def test_how_long_a_clip_probably_is(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(24000), 16000)
    make_video(tmp_path / "a.mp4", 10, audio=0.4)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    assert seconds(tmp_path / "a.wav") == 1.5
    assert seconds(tmp_path / "a.wav", 0.5) == 1
    assert seconds(tmp_path / "a.wav", end=9) == 1.5
    assert seconds(tmp_path / "a.wav", start=9) == 0
    assert seconds(tmp_path / "a.mp4") == pytest.approx(0.4, abs=0.1)
    assert seconds(tmp_path / "none.wav", 1, 3) == 2
    assert [seconds(tmp_path / name) for name in ("bad.wav", "none.wav")] == [None, None]


def test_how_long_a_clip_is_by_its_packets(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(24000), 16000)
    assert length(tmp_path / "a.wav") == 1.5
    assert length(make_video(tmp_path / "a.mp4", 10, audio=2.0)) == pytest.approx(2.0, abs=0.15)
    path = make_video(tmp_path / "late.mkv", 3, times=[0, 40, 9000])
    assert length(path) == pytest.approx(9.0, abs=0.15)
    data = path.read_bytes()  # as a browser records: the head does not know how long it will be
    at = data.index(b"\x44\x89\x88")
    path.write_bytes(data[: at + 3] + struct.pack(">d", 1.0) + data[at + 11 :])
    assert probe(path)["duration"] < 1
    assert length(path) == pytest.approx(9.0, abs=0.15)
    with pytest.raises(MediaError):
        length(tmp_path / "none.wav")


@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4", "a.ffconcat"])
def test_a_playlist_is_no_clip(tmp_path, name):
    """What it names may be any file of this machine."""
    film = make_video(tmp_path / "film.ts", 10)
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\n{film.name}\n#EXT-X-ENDLIST\n"
    (tmp_path / name).write_text(f"ffconcat version 1.0\nfile {film.name}\n" if name == "a.ffconcat" else hls)
    for read in (load_frame, load_audio, probe, length):
        with pytest.raises(MediaError):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "mpeg4", {"bf": "2"}),
        ("a.avi", "mpeg4", {"bf": "2"}),
        ("a.mkv", "libx264", {"bf": "3"}),
        ("a.mp4", "libx264", {"bf": "3"}),
        ("a.avi", "libx264", {"bf": "3"}),  # AVI stores no display times: B-frames come out with wrong ones
    ],
)
def test_every_frame_in_display_order(tmp_path, name, codec, options):
    path = make_video(tmp_path / name, 12, codec=codec, options=options, gop=4)
    assert grey(load_frames(path, 12)) == list(range(12))
    assert grey(load_frames(path, indices=[7, 0, 11, 7])) == [7, 0, 11, 7]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_frames_are_at_the_centres_of_equal_spans(tmp_path, name):
    path = make_video(tmp_path / name, 20)
    frames = load_frames(path, 4)
    assert frames.shape == (4, H, W, 3)
    assert frames.dtype == torch.uint8
    assert grey(frames) == [2, 7, 12, 17]  # 0.8 s, spans of 0.2 s, 25 frames a second
    assert grey(load_frames(path, 2, start=0.4, end=0.6)) == [11, 13]
    assert grey(load_frames(path, 1, start=0.4, end=9.0)) == [15]
    assert grey(load_frames(path, indices=[0, 1], start=0.4)) == [10, 11]
    assert grey(load_frames(path, 4, phase=0.9)) == [4, 9, 14, 19]
    assert grey(load_frame(path, 0.6, start=0.4)[None]) == [16]


def test_jumps_over_groups_of_pictures_give_the_same_frames(tmp_path):
    path = make_video(tmp_path / "a.mp4", 31, codec="libx264", options={"bf": "2"}, gop=5)
    everything = load_frames(path, 31)
    wanted = [0, 3, 4, 5, 6, 14, 15, 16, 29, 30]
    assert torch.equal(load_frames(path, indices=wanted), everything[wanted])
    assert torch.equal(load_frames(path, indices=[0], start=0.84), everything[21:22])


def test_variable_frame_rate_goes_by_time(tmp_path):
    # the third frame stays on screen for 0.8 s of 1 s
    path = make_video(tmp_path / "a.mkv", 5, times=[0, 50, 100, 900, 950])
    assert grey(load_frames(path, 10)) == [0, 2, 2, 2, 2, 2, 2, 2, 2, 3]
    assert grey(load_frame(path, "middle")[None]) == [2]
    assert grey(load_frames(path, indices=[3])) == [3]


def test_fewer_frames_than_asked_repeat(tmp_path):
    assert grey(load_frames(make_video(tmp_path / "a.mp4", 2), 6)) == [0, 0, 0, 1, 1, 1]
    assert grey(load_frames(make_video(tmp_path / "b.mp4", 1), 3)) == [0, 0, 0]


def test_load_frame(tmp_path):
    path = make_video(tmp_path / "a.mp4", 9)
    assert [grey(load_frame(path, which)[None])[0] for which in ("first", "middle", 6)] == [0, 4, 6]
    assert [grey(load_frame(path, part)[None])[0] for part in (0.0, 0.3, 0.5, 0.7, 0.99)] == [0, 2, 4, 6, 8]
    with pytest.raises(MediaError, match=r"a\.mp4: frame 9 of 9$"):
        load_frame(path, 9)
    with pytest.raises(MediaError, match=r"a\.mp4: frame -1 of 9$"):
        load_frame(path, -1)


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))])
def test_rotation_metadata_is_applied(tmp_path, rotation, corner):
    frame = load_frame(make_video(tmp_path / "a.mp4", 1, rotation=rotation))
    assert tuple(frame.shape) == ((H, W, 3) if rotation in (0, 180) else (W, H, 3))
    rows = slice(0, 6) if corner[0] == 0 else slice(-6, None)
    columns = slice(0, 6) if corner[1] == 0 else slice(-6, None)
    assert frame[rows, columns].float().mean() > 200
    assert frame.float().mean() < 20


def test_first_of_two_video_streams(tmp_path):
    path = make_video(tmp_path / "a.mkv", 4, extra=(20,))
    assert grey(load_frames(path, 4)) == [0, 1, 2, 3]
    assert probe(path)["frames"] == 4


def test_still_pictures_are_clips_of_one_frame(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((H, W, 3), np.uint8)
    pixels[:16, :16] = 255
    exif = image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    image.fromarray(pixels).save(tmp_path / "a%03d.jpg", quality=95, exif=exif)
    image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load_frames(tmp_path / "a.png", 3).numpy(), np.stack([pixels] * 3))
    turned = load_frame(tmp_path / "a%03d.jpg", "middle").numpy()
    assert np.abs(turned.astype(int) - np.rot90(pixels, -1)).mean() < 3
    assert probe(tmp_path / "a.png")["frames"] == 1
    with pytest.raises(NoAudio, match=r"a\.png: no audio stream$"):
        load_audio(tmp_path / "a.png")


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    tone = np.sin(np.arange(16000) / 9).astype(np.float32)
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = W, H, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((H, W, 3), np.uint8), "rgb24")))
        container.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(tone[None], "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    facts = probe(path)
    assert (facts["has_audio"], facts["has_video"], facts["frames"]) == (True, False, 0)
    with pytest.raises(NoVideo, match=r"a\.mp4: no video stream$"):
        load_frames(path, 1)


def test_video_with_and_without_sound(tmp_path):
    path = make_video(tmp_path / "a.mp4", 25, audio=1.0)
    samples = load_audio(path)
    assert samples.dtype == torch.float32
    assert abs(len(samples) - 16000) < 1100
    assert abs(pitch(samples, 16000) - 440) < 2
    facts = probe(path)
    assert (facts["has_audio"], facts["sample_rate"], facts["width"], facts["height"]) == (True, 16000, W, H)
    assert (facts["fps"], facts["frames"], facts["duration"]) == (25.0, 25, pytest.approx(1.0, abs=0.1))
    with pytest.raises(NoAudio, match=r"b\.mp4: no audio stream$"):
        load_audio(make_video(tmp_path / "b.mp4"))


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_window_of_a_container_s_sound(tmp_path, name):
    whole = load_audio(make_video(tmp_path / name, 50, audio=2.0))
    part = load_audio(tmp_path / name, start=1.0, end=1.5)
    assert len(part) == 8000
    assert (part - whole[16000:24000]).abs().max() < 1e-3
    with pytest.raises(MediaError, match=rf"{name}: no samples from 7 s to 8 s$"):
        load_audio(tmp_path / name, start=7, end=8)
    with pytest.raises(MediaError, match=rf"{name}: no frames from 7 s to 8 s$"):
        load_frames(tmp_path / name, 2, start=7, end=8)


def test_stereo_24_bit_44_khz_is_mixed_and_resampled(tmp_path):
    time = np.arange(44100) / 44100
    left, right = 0.5 * np.sin(2 * np.pi * 300 * time), 0.25 * np.sin(2 * np.pi * 300 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 44100, subtype="PCM_24")
    samples = load_audio(tmp_path / "a.wav", 16000)
    expected = 0.375 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)
    assert len(samples) == 16000
    assert np.abs(samples.numpy() - expected)[200:-200].max() < 1e-3
    part = load_audio(tmp_path / "a.wav", 44100, start=0.25, end=0.5).numpy()
    assert np.abs(part - 0.375 * np.sin(2 * np.pi * 300 * time[11025:22050])).max() < 1e-6


def test_same_samples_by_both_decoders(tmp_path):
    signal = np.random.default_rng(0).uniform(-1, 1, (4000, 2)).astype(np.float32)
    for subtype in ("PCM_U8", "PCM_16", "PCM_32", "FLOAT"):
        soundfile.write(tmp_path / "a.wav", signal, 16000, subtype=subtype)
        Path(tmp_path / "a.wave").write_bytes(Path(tmp_path / "a.wav").read_bytes())  # not a suffix of libsndfile
        assert (load_audio(tmp_path / "a.wav") - load_audio(tmp_path / "a.wave")).abs().max() < 1e-6, subtype


def test_damaged_files(tmp_path):
    whole = make_video(tmp_path / "whole.mp4", 60, audio=2.4, gop=5).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # the index at the end is lost
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video at all\n" * 50)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    (tmp_path / "header.wav").write_bytes(b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt ")
    for name, reason in (
        ("cut.mp4", "Invalid data found when processing input"),
        ("text.mp4", "Invalid data found when processing input"),
        ("empty.wav", "empty file"),
        ("none.wav", "no samples"),
        ("header.wav", ".*"),
        ("absent.mp4", "not found"),
    ):
        with pytest.raises(MediaError, match=rf"^\S*{name}: {reason}$"):
            load_audio(tmp_path / name)
    with pytest.raises(MediaError, match=r"cut\.mp4: Invalid data found when processing input$"):
        load_frames(tmp_path / "cut.mp4", 4)
    with pytest.raises(MediaError, match=r": is a folder$"):
        load_frames(tmp_path, 1)


def test_cut_short_after_the_index(tmp_path):
    """With the index in front a cut file opens; less than half of it is an error, not a shorter clip."""
    front = tmp_path / "b.mp4"
    with av.open(str(make_video(tmp_path / "c.mp4", 60, gop=5))) as source:
        with av.open(str(front), "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    content = front.read_bytes()
    front.write_bytes(content[: content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 4])
    with pytest.raises(MediaError, match=r"b\.mp4: truncated, 0\.\d s of 2\.4 s$"):
        load_frames(front, 4)


def pack(path, members, format=tarfile.PAX_FORMAT, mode="w"):
    """A tar of name -> file to put in, bytes or type of member."""
    with tarfile.open(path, mode, format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
                member.type, member.linkname = content, "a.wav"
                tar.addfile(member)
            else:
                content = content.read_bytes() if isinstance(content, Path) else content
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_of_a_tar_are_decoded_in_place(tmp_path, format):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, 8000), 16000)
    soundfile.write(tmp_path / "a.mp3", np.sin(np.arange(24000) / 9), 24000)
    make_video(tmp_path / "a.mp4", 10, audio=0.4)
    make_video(tmp_path / "a%03d.mkv", 10, audio=0.4)
    names = {f"./{'long' * 40}/é {name}": name for name in ("a.wav", "a.mp3", "a.mp4", "a%03d.mkv")}
    tar = pack(tmp_path / "clips.TAR", {member: tmp_path / name for member, name in names.items()}, format)
    for member, name in names.items():
        loose, packed = tmp_path / name, tar / member
        for window in ({}, {"start": 0.1, "end": 0.3}):
            assert torch.equal(load_audio(packed, **window), load_audio(loose, **window)), name
        facts = probe(packed)
        assert facts == probe(loose)
        if facts["has_video"]:
            assert torch.equal(load_frames(packed, 3), load_frames(loose, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names.values(), "clips.TAR"])


def test_pictures_in_a_tar(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("a%03d.jpg", "a.png"):
        image.fromarray(np.full((H, W, 3), 80, np.uint8)).save(tmp_path / name)
        tar = pack(tmp_path / "a.tar", {name: tmp_path / name})
        tar_index.cache_clear()
        assert torch.equal(load_frames(tar / name, 2), load_frames(tmp_path / name, 2))


def test_only_regular_files_of_a_tar(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16000)
    odd = {"link.wav": tarfile.SYMTYPE, "hard.wav": tarfile.LNKTYPE, "pipe.wav": tarfile.FIFOTYPE}
    members = {"a.wav": tmp_path / "a.wav", **odd, "d": tarfile.DIRTYPE, "empty.wav": b"", "../up.wav": b"x"}
    tar = pack(tmp_path / "a.tar", members)
    assert set(tar_index(tar)) == {"a.wav", "empty.wav", "../up.wav"}
    assert len(load_audio(tar / "a.wav")) == 100
    for name in (*odd, "d", "b.wav", "a.wav/b.wav", "../a.tar.wav"):
        with pytest.raises(MediaError, match=r"a\.tar/.*: not found$"):
            load_audio(tar / name)
    with pytest.raises(MediaError, match=r"a\.tar/empty\.wav: empty file$"):
        load_audio(tar / "empty.wav")
    (tmp_path / "b.tar").mkdir()
    soundfile.write(tmp_path / "b.tar/a.wav", np.zeros(50), 16000)
    assert len(load_audio(tmp_path / "b.tar/a.wav")) == 50


def test_damaged_tars(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(4000), 16000)
    whole = pack(tmp_path / "a.tar", {name: tmp_path / "a.wav" for name in ("a.wav", "b.wav", "c.wav")}).read_bytes()
    size = (512 + tmp_path.joinpath("a.wav").stat().st_size + 511) // 512 * 512
    negative = tarfile.TarInfo("b.wav").tobuf()
    negative = bytearray(negative[:124] + b"\xff" * 11 + b"\x00" + negative[136:])  # base 256, below zero
    negative[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(negative))[0]
    contents = {
        "half": whole[: size + size // 2],
        "rubbish": whole[:size] + b"rubbish!" * 1000,
        "empty": b"",
        "text": b"no tar at all\n" * 100,
        "zipped": pack(tmp_path / "z.tar", {"a.wav": b"x"}, mode="w:gz").read_bytes(),
        "negative": whole[:size] + bytes(negative) + whole[size:],
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(MediaError, match=rf"^\S*{name}\.tar: damaged tar \(.+\)$"):
            load_audio(tmp_path / f"{name}.tar/a.wav")
    (tmp_path / "whole.tar").write_bytes(whole[: 3 * size])  # some writers leave the end out
    assert len(load_audio(tmp_path / "whole.tar/a.wav")) == 4000


def test_errors_hold_one_line(tmp_path):
    (tmp_path / "bad.avi").write_bytes(os.urandom(2000))
    with pytest.raises(MediaError) as error:
        load_frames(tmp_path / "bad.avi", 1)
    assert str(error.value).startswith(str(tmp_path / "bad.avi") + ": ")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not SHARED, reason="EMOTORCH_DATA is not set")
@pytest.mark.parametrize("name", ["WDA_KatieHill_000.mp4", "nasa_13013.mp4", "short_hamilton_clip.mp4"])
def test_real_clips_match_a_full_decode(name):
    path = Path(str(SHARED), "video", name)
    wanted = [0, 1, 60, 61, 150, 199]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for i, frame in enumerate(container.decode(video=0)) if i in wanted]
    assert np.array_equal(load_frames(path, indices=wanted).numpy(), np.stack(frames))
    facts = probe(path)
    assert abs(len(load_audio(path)) / 16000 - facts["duration"]) < 0.1
