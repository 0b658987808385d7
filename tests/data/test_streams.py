"""Streams of turns: what their clips become, and what is said of clips that are missing, broken or silent."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common.config import UserError
from data import streams
from data.joined import join_sound, windows
from data.media import SAMPLE_RATE, load_audio
from data.mesc import Turn
from data.streams import TurnStreams, clip_folder
from tests.data.test_media import make_video

SHAPES = {"video": (4, 2, 3), "audio": (10, 800)}
SECONDS = 8000 / SAMPLE_RATE


class Eye:
    """Tells frames by their level, and notes what sizes it sees."""

    name = "eye"

    def film(self, clips):
        light = torch.cat([frames[:, 24, 32].float().mean(-1) / 8 for frames in clips])
        return light[:, None, None].expand(len(light), 2, 3)

    def info(self, pooling):
        return {"encoder": "eye", "pooling": pooling, "weights_sha256": {"eye": "1"}}


class Ear:
    """Gives back what it hears."""

    name, poolings = "ear", ("frames",)

    def encode(self, x, pooling):
        assert pooling == "frames"
        return x.view(10, -1)

    def info(self, pooling):
        return {"encoder": "ear", "pooling": pooling, "weights_sha256": None}


@pytest.fixture
def folder(tmp_path):
    """Clips a to d with 10 frames each, c without sound, d broken; what else turns name is not there."""
    folder = tmp_path / "video_data"
    folder.mkdir()
    for name in "ab":
        make_video(folder / f"{name}.mp4", 10, audio=0.4)
    make_video(folder / "c.mp4", 10)
    (folder / "d.mp4").write_text("no film")
    return folder


def turn(*clips, id="1_0"):
    return Turn(id, "1", "train", "", "", "Hello.", "Hi.", None, None, None, list(clips), where=f"train.jsonl:{id}")


def make(folder, shapes=SHAPES, eye=None, ear=None, **options):
    options = {"num_frames": 4, "audio_seconds": SECONDS} | options
    return TurnStreams(folder, shapes, eye or Eye(), ear or Ear(), **options)


def light(values):
    return [round(level) for level in values["video"][:, 0, 0].tolist()]


def test_clips_of_a_turn_are_joined(folder):
    values = make(folder)(turn("a.mp4", "b.mp4"))
    assert {name: tuple(value.shape) for name, value in values.items()} == SHAPES
    assert light(values) == [2, 7, 2, 7]  # places 2, 7, 12 and 17 of 20
    sound = torch.cat([load_audio(folder / "a.mp4"), load_audio(folder / "b.mp4")])
    assert len(sound) > 8000
    assert torch.equal(values["audio"].flatten(), sound[:8000])


def test_a_shorter_sound_ends_in_silence(folder):
    heard = make(folder)(turn("a.mp4"))["audio"].flatten()
    sound = load_audio(folder / "a.mp4")
    assert torch.equal(heard, torch.cat([sound, torch.zeros(8000 - len(sound))]))


def test_windows_of_the_sound(folder, tmp_path):
    make_video(tmp_path / "long.mp4", 75, audio=3.0)
    heard = make(folder, {**SHAPES, "audio": (10, 32000)}, audio_windows=True, audio_seconds=20)(
        turn(str(tmp_path / "long.mp4"))  # an absolute path
    )["audio"].flatten()
    expected = windows(join_sound([tmp_path / "long.mp4"], None))
    assert len(expected) == 16 * SAMPLE_RATE
    assert torch.equal(heard[: len(expected)], expected)
    assert not heard[len(expected) :].any()


def test_the_latest_clips_count(folder):
    for k, expected in ((1, [1, 3, 6, 8]), (2, [2, 7, 2, 7]), (9, [4, 1, 8, 5])):
        assert light(make(folder, num_k_vid=k)(turn("a.mp4", "b.mp4", "c.mp4"))) == expected


def test_what_a_turn_lacks_is_absent_and_no_error(folder):
    made, said = make(folder), []
    made.scan([turn("c.mp4"), turn()], 0.0, said.append)
    assert list(made(turn("c.mp4"))) == ["video"]  # silent
    assert made(turn()) == {}
    assert (made.slots(turn("c.mp4")), made.slots(turn())) == (["video", "audio"], [])
    assert made.slots(turn("x.mp4", "a.mp4")) == ["video", "audio"]
    assert made.slots(turn("x.mp4")) == []
    assert (said, made.broken, made.lost) == ([], {}, set())
    blind = TurnStreams(folder, SHAPES, ear=Ear(), audio_seconds=SECONDS)
    assert (list(blind(turn("a.mp4"))), blind.slots(turn("a.mp4"))) == (["audio"], ["audio"])
    neither = TurnStreams(folder, {})
    neither.scan([turn("x.mp4")], 0.0, said.append)
    assert (neither(turn("a.mp4")), neither.slots(turn("a.mp4")), said) == ({}, [], [])


def test_missing_and_broken_clips_are_left_out_and_said_once(folder):
    turns = [turn("a.mp4", "x.mp4", "b.mp4", "d.mp4"), turn("d.mp4", "a.mp4", id="1_1"), turn("y.mp4", "a.mp4")]
    made, said = make(folder), []
    made.scan(turns, 0.0, said.append)
    assert said == [f"2 of 5 clips are not there, the first: {folder}/x.mp4: not found; they are left out"]
    for _ in range(2):
        found = made(turns[0])
        expected = make(folder)(turn("a.mp4", "b.mp4"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert light(made(turns[1])) == [1, 3, 6, 8]
    assert said[1:] == [f"{folder}/d.mp4: Invalid data found when processing input; its video is left out"]
    assert made.lost == set()


def test_turns_that_lose_all_of_their_clips_are_counted(folder):
    turns = [turn("a.mp4", id=f"1_{i}") for i in range(8)] + [turn("d.mp4", id="2_0"), turn("d.mp4", "d.mp4", id="2_1")]
    made, said = make(folder), []
    made.scan([*turns, turn(id="3_0")], 0.1, said.append)
    before = made.slots(turns[8])
    assert made(turns[8]) == made(turns[8]) == {}
    assert len(said) == 1
    assert made.slots(turns[8]) == before  # in every process, whichever of them has read the clip
    with pytest.raises(UserError, match=r"^2 of 10 turns have lost all of their clips, --max-bad allows 1: the last: "):
        made(turns[9])


def test_too_many_turns_without_clips_end_the_run_at_once(folder):
    turns = [turn("a.mp4", id="1_0"), turn("x", "y", id="1_1"), turn("", "z.mp4", "b.mp4", id="1_2")]
    made = make(folder)
    made.scan(turns, 0.4, lambda line: None)
    with pytest.raises(UserError) as error:
        made.scan(turns, 0.3, lambda line: None)
    assert str(error.value) == (
        "1 of 3 turns have lost all of their clips, --max-bad allows 0: 4 of 6 clips are not there, the first: "
        f"{folder}/x: not found (clips are named with their extension, such as .mp4); --vid-folder names their folder"
    )


def test_a_clip_may_lack_one_stream_only(folder, monkeypatch):
    """Its sound is damaged: the picture stays."""

    def damaged(paths, failed):
        for path in paths:
            failed(path, streams.MediaError(f"{path}: truncated"))

    monkeypatch.setattr(streams, "join_sound", damaged)
    made, said = make(folder), []
    made.scan([turn("a.mp4")], 1.0, said.append)
    assert list(made(turn("a.mp4"))) == list(made(turn("a.mp4"))) == ["video"]
    assert said == [f"{folder}/a.mp4: truncated; its audio is left out"]
    assert len(made.lost) == 1


def test_threads_say_a_broken_clip_once(folder, monkeypatch):
    together, said = threading.Barrier(4, timeout=10), []

    def broken(paths, n, failed):
        together.wait()
        for path in paths:
            failed(path, streams.MediaError("broken"))
        return []

    monkeypatch.setattr(streams, "join_frames", broken)
    made = TurnStreams(folder, SHAPES, Eye(), num_frames=4)
    made.scan([turn("a.mp4")], 1.0, said.append)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(made, [turn("a.mp4")] * 4)) == [{}] * 4
    assert said == ["broken; its video is left out"]


def test_shapes_that_the_model_does_not_expect(folder):
    with pytest.raises(UserError) as error:
        make(folder, {"video": (4, 729, 1152), "audio": (5, 800)}, num_frames=6)
    assert str(error.value) == (
        "eye makes video (6, 2, 3), the model expects (4, 729, 1152): --num-frames 6 --model.towers.patches 2 "
        "--model.towers.vision-width 3; ear makes audio (10, 800), the model expects (5, 800): "
        "--model.towers.audio-tokens 10"
    )


@pytest.mark.parametrize(
    ("option", "name"),
    [("num_k_vid", "num-k-vid"), ("num_frames", "num-frames"), ("audio_seconds", "model.towers.audio-seconds")],
)
def test_there_must_be_something_to_see_and_to_hear(folder, option, name):
    with pytest.raises(UserError, match=rf"^--{name}: must be above 0$"):
        make(folder, **{option: 0})


def test_how_streams_are_made_and_by_which_weights(folder):
    made = make(folder)
    told = made.describe()
    common = {"num_k_vid": 5}
    assert told["video"] == {**Eye().info("patches"), **common, "num_frames": 4, "shape": [4, 2, 3]}
    sound = {"audio_seconds": SECONDS, "audio_windows": False, "shape": [10, 800]}
    assert told["audio"] == {**Ear().info("frames"), **common, **sound}
    made.check_made(told)
    made.check_made({})
    told["audio"]["weights_sha256"] = {"ear": "2"}  # not known here
    made.check_made(told)
    told["video"]["weights_sha256"] = {"eye": "2"}
    with pytest.raises(UserError, match=r"^video is made with other weights of eye than in training$"):
        made.check_made(told)


def test_values_can_be_trained_on(folder):
    weight = torch.ones(3, requires_grad=True)
    (make(folder)(turn("a.mp4"))["video"] * weight).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_the_folder_of_the_clips(tmp_path):
    file = tmp_path / "train.jsonl"
    with pytest.raises(UserError) as error:
        clip_folder(file)
    looked = ", ".join(str(tmp_path / name) for name in ("video_data", "videos", "video"))
    assert str(error.value) == (
        f"{file}: the folder of its clips was not found (looked for {looked}); --vid-folder names it"
    )
    for name in ("video", "videos", "video_data"):  # the later, the sooner taken
        (tmp_path / name).mkdir()
        assert clip_folder(file) == tmp_path / name
    assert clip_folder(file, str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match=r"was not found \(looked for \S+none\); --vid-folder names it$"):
        clip_folder(file, str(tmp_path / "none"))


def test_values_are_made_once_while_there_is_room(folder, monkeypatch):
    looks = []

    class Counting(Eye):
        def film(self, clips):
            looks.append(len(clips))
            return super().film(clips)

    monkeypatch.setattr(streams, "KEPT", 100)  # bytes: of two videos of 96 the first
    made = make(folder, eye=Counting())
    looks.clear()
    for _ in range(3):
        assert light(made(turn("a.mp4"), ["video"])) == [1, 3, 6, 8]
        assert light(made(turn("a.mp4", "b.mp4"), ["video"])) == [2, 7, 2, 7]
    assert looks == [1, 2, 2, 2]


def test_an_ear_that_makes_statistics_hears_no_silence_after_a_sound(folder):
    class Mean(Ear):
        poolings = ("stats", "frames")

        def encode(self, x, pooling):
            assert pooling == "stats"
            return torch.stack([x.mean(), x.new_tensor(len(x))])

    value = make(folder, {**SHAPES, "audio": (1, 2)}, ear=Mean(), audio_seconds=5)(turn("a.mp4"), ["audio"])["audio"]
    sound = load_audio(folder / "a.mp4")
    assert value.shape == (1, 2)
    assert value[0, 1] == len(sound)
    torch.testing.assert_close(value[0, 0], sound.mean())
