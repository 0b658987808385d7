"""Sound and words in memory: splits and what is held out, features by clip, scripts, dealing, messages."""

import re
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from common.config import UserError
from data import pairs
from data.features import StoreWriter, open_features
from data.manifest import Clip, group_of, write_manifest
from data.pairs import PairsConfig, load
from data.resident import Ragged

LABELS = ["anger", "joy", "neutral"]
DIM = 4


def lines(n=12, **fields):
    """Clips of n scripts, each said by two voices."""
    return [Clip(f"s{i}v{v}", text=f"Line {i}.", label=LABELS[i % 3], speaker=f"v{v}", group=f"s{i}", **fields)
            for i in range(n) for v in range(2)]  # fmt: skip


def store(folder, clips, kind="frames", seed=0):
    """Features of all clips but the third: vectors, frames of lengths 1 to 4, or ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = kind.startswith("ids")
    writer = StoreWriter(folder, {"encoder": "drawn", "dim": 50 if ids else DIM, "kind": "ids" if ids else "dense"})
    made = {}
    for i, clip in enumerate(clips):
        length = 3 if kind == "ids alike" else 1 + i % 4
        drawn = (
            torch.randint(50, (length,), dtype=torch.int32, generator=generator) if ids
            else 3 + 2 * torch.randn(*(() if kind == "vectors" else (length,)), DIM, generator=generator)
        )  # fmt: skip
        if i != 2:
            made[clip.id] = drawn
            writer.add(clip.id, drawn)
    writer.finish()
    return made


def root(folder, clips, **kinds):
    """A data root and its features."""
    write_manifest(folder / "manifest.csv", clips)
    kinds = kinds or {"audio": "frames", "text": "ids"}
    return {m: store(folder / m, clips, kind, seed) for seed, (m, kind) in enumerate(kinds.items())}


def nothing(_):
    raise AssertionError("nothing was to be said")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_the_manifests_splits_are_kept():
    clips = [*lines(2, split="valid"), *lines(3), *lines(2, split="test"), *lines(1, split="train")]
    said = []
    found = pairs.split(clips, PairsConfig(), "list", said.append)
    assert {name: len(part) for name, part in found.items()} == {"train": 8, "valid": 4, "test": 4}
    assert found["train"] == [*clips[4:10], *clips[14:]]
    assert all("leak" in line for line in said)  # nothing is held out


def test_a_fold_is_the_test_split():
    clips = [*lines(4, fold="1", split="test"), *lines(30, fold="2", split="train"), *lines(4)]
    for i, clip in enumerate(clips):
        clip.group = f"g{i // 2}"
    found = pairs.split(clips, PairsConfig(fold="1", valid_share=0), "list", nothing)
    assert found == {"train": clips[8:], "valid": [], "test": clips[:8]}
    said = []
    found = pairs.split(clips, PairsConfig(fold="1", valid_share=0.2), "list", said.append)
    assert found["test"] == clips[:8]
    assert found["train"] != clips[8:]
    assert said == [f"valid: {len(found['valid'])} clips of train held out by group (seed 0)"]
    with pytest.raises(UserError) as error:
        pairs.split(clips, PairsConfig(fold="3"), "x/list.csv", nothing)
    assert str(error.value) == "x/list.csv: no clips of fold 3 (folds: 1, 2)"
    with pytest.raises(UserError, match=re.escape("(folds: none)")):
        pairs.split(lines(), PairsConfig(fold="3"), "x/list.csv", nothing)


def test_whole_groups_are_held_out():
    said, clips = [], lines(50)
    found = pairs.split(clips, PairsConfig(valid_share=0.2, test_share=0.1), "list", said.append)
    assert sorted(clip.id for part in found.values() for clip in part) == sorted(clip.id for clip in clips)
    groups = [{group_of(clip) for clip in part} for part in found.values()]
    assert sum(map(len, groups)) == 50
    assert len(found["test"]) == 10
    assert len(found["valid"]) == 18  # of the 90 that are left
    assert said == [
        "test: 10 clips of train held out by group (seed 0)", "valid: 18 clips of train held out by group (seed 0)",
    ]  # fmt: skip
    again = pairs.split(clips, PairsConfig(valid_share=0.2, test_share=0.1), "list", said.append)
    other = pairs.split(clips, PairsConfig(valid_share=0.2, test_share=0.1, split_seed=1), "list", said.append)
    assert again == found
    assert other["test"] != found["test"]
    assert "(seed 1)" in said[-1]


def test_nothing_is_held_out_for_a_share_of_0():
    found = pairs.split(lines(), PairsConfig(valid_share=0, test_share=0), "list", nothing)
    assert {name: len(part) for name, part in found.items()} == {"train": 24, "valid": 0, "test": 0}


def test_groups_in_two_splits_are_a_leak():
    clips = [*lines(6, split="train"), *lines(2, split="valid"), *lines(1, split="test")]
    for clip in clips[16:]:
        clip.group = "other"
    clips[15].group = "fresh"
    said = []
    pairs.split(clips, PairsConfig(), "list", said.append)
    assert said == ["leak: 2 groups are in both train and valid, such as 's0'"]
    clips[16].group = "s0"
    said.clear()
    pairs.split(clips, PairsConfig(), "list", said.append)
    assert said == [
        "leak: 2 groups are in both train and valid, such as 's0'",
        "leak: 1 groups are in both train and test, such as 's0'",
        "leak: 1 groups are in both valid and test, such as 's0'",
    ]


def test_the_limit_is_of_each_split():
    clips = [*lines(8, split="train"), *lines(1, split="valid"), *lines(4, split="test")]
    for i, clip in enumerate(clips):
        clip.group = f"g{i}"
    found = pairs.split(clips, PairsConfig(limit=5), "list", nothing)
    assert {name: len(part) for name, part in found.items()} == {"train": 5, "valid": 2, "test": 5}
    assert found["train"] == clips[:5]


def test_no_clips_to_train_on():
    with pytest.raises(UserError) as error:
        pairs.split(lines(split="test"), PairsConfig(valid_share=0), "x/list.csv", nothing)
    assert str(error.value) == "x/list.csv: no clips to train on"


def test_classes_are_those_of_train():
    splits = {"train": lines(2), "valid": lines(3), "test": []}
    splits["train"].append(Clip("x"))
    assert pairs.classes(splits) == ["anger", "joy"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_lists_of_clips(tmp_path):
    clips = [*lines(6, split="train"), *lines(6, split="test")]
    for i, clip in enumerate(clips):
        clip.id, clip.group = f"clip{i}", f"g{i}"
    write_manifest(tmp_path / "manifest.csv", clips)
    write_manifest(tmp_path / "other.csv", clips[:14])
    cfg = PairsConfig(data_root=str(tmp_path), valid_share=0)
    assert [len(part) for part in pairs.read_clips(cfg, nothing).values()] == [12, 0, 12]
    cfg.manifest = str(tmp_path / "other.csv")
    assert [len(part) for part in pairs.read_clips(cfg, nothing).values()] == [12, 0, 2]
    cfg = PairsConfig(data_root=str(tmp_path / "gone"))
    with pytest.raises(UserError) as error:
        pairs.read_clips(cfg, nothing)
    assert str(error.value) == (
        f"{tmp_path / 'gone' / 'manifest.csv'} not found: --data-root names a folder with manifest.csv, --manifest "
        "another list"
    )


def test_data_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def never():
        raise AssertionError("there is a data set")

    places = ("one/set", "two/set")
    with pytest.raises(UserError) as error:
        pairs.find_data(PairsConfig(), places, False, never, nothing)
    assert str(error.value) == (
        "no data: one/set/manifest.csv and two/set/manifest.csv not found; --data-root names a folder with "
        "manifest.csv and the stores audio/ and text/, --fast needs none"
    )
    cfg = PairsConfig()
    pairs.find_data(cfg, places, True, lambda: tmp_path / "made", nothing)
    assert (cfg.data_root, cfg.limit) == (str(tmp_path / "made"), 0)

    write_manifest(tmp_path / "two/set/manifest.csv", lines())
    for fast, limit, expected in ((False, 0, 0), (True, 0, 2000), (True, 7, 7)):
        cfg, said = PairsConfig(limit=limit), []
        pairs.find_data(cfg, places, fast, never, said.append)
        assert (cfg.data_root, cfg.limit) == ("two/set", expected)
        assert said == (["--fast: at most 2000 clips of each split of two/set"] if expected == 2000 else [])

    for given in ({"data_root": "here"}, {"manifest": "list.csv"}):  # what is named is not looked for
        cfg = PairsConfig(**given)
        pairs.find_data(cfg, places, True, never, nothing)
        assert cfg == PairsConfig(**given)


def test_stores_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = lines()
    root(tmp_path / "data", clips)
    store(tmp_path / "other", clips, "vectors")
    (tmp_path / "data/text").rename(tmp_path / "words")
    assert list(pairs.open_stores(PairsConfig(data_root="data"))) == ["audio"]
    both = pairs.open_stores(PairsConfig(data_root="data", stores={"text": "words"}))
    assert list(both) == ["audio", "text"]
    assert both["text"].info["kind"] == "ids"
    swapped = pairs.open_stores(PairsConfig(data_root="data", stores={"audio": str(tmp_path / "other")}))
    assert str(swapped["audio"].folder) == str(tmp_path / "other")
    assert list(pairs.open_stores(PairsConfig(manifest="list.csv", stores={"text": "words"}))) == ["text"]


def test_stores_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/audio").mkdir(parents=True)  # of waveforms
    none = "holds no store audio/ or text/ (extract.py makes one; --stores names others)"
    for given, place in (({"data_root": "data"}, "data"), ({"manifest": "list.csv"}, ".")):
        with pytest.raises(UserError) as error:
            pairs.open_stores(PairsConfig(**given))
        assert str(error.value) == f"{place}: {none}"
    with pytest.raises(UserError) as error:
        pairs.open_stores(PairsConfig(data_root="data", stores={"voice": "x"}))
    assert str(error.value) == "--stores: 'voice' is not one of audio, stats, text"
    with pytest.raises(UserError, match="features not found: neither gone nor features/gone is a folder"):
        pairs.open_stores(PairsConfig(data_root="data", stores={"text": "gone"}))


# --- clips in memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("audio", ["vectors", "frames"])
@pytest.mark.parametrize("text", ["vectors", "ids", "ids alike"])
def test_features_lie_by_clip(tmp_path, audio, text):
    clips = lines()
    made = root(tmp_path, clips, audio=audio, text=text)
    opened = {m: open_features(tmp_path / m) for m in made}
    data = load(clips[::-1], opened, LABELS, PairsConfig(max_frames=3))
    assert len(data) == 24
    index = torch.tensor([[*range(23, 11, -1)], [*range(12)]])
    x, mask = data.gather(index)
    for k, row in enumerate(index.tolist()):
        for b, i in enumerate(row):
            for m, part in made.items():
                frames = part.get(data.clips[i].id, x[m][k, b, :0])
                frames = torch.atleast_2d(frames) if frames.is_floating_point() else frames
                n = min(3, len(frames))
                assert mask[m][k, b].tolist() == [t < n for t in range(mask[m].shape[-1])]
                assert torch.equal(x[m][k, b, :n], frames[:n])
    kinds = pairs.sources(opened, data.parts)
    assert kinds["audio"] == {"dim": DIM, "kind": "dense", "frames": audio == "frames"}
    assert kinds["text"]["kind"] == ("dense" if text == "vectors" else "ids")
    assert data.nbytes == sum(part.values.nbytes + part.rows.nbytes for part in data.parts.values())
    assert data.ids([torch.tensor([0, 3]), torch.tensor([5])], 0) == [data.clips[0].id, data.clips[3].id]


def test_labels_and_scripts():
    texts = ["Go  away.", "go away.", None, "GO AWAY.", "Come!", "go away", None, "Straße", "STRASSE"]
    labels = ["joy", "anger", "fear", None, "joy", "neutral", "Joy", "joy", "joy"]
    clips = [Clip(f"c{i}", text=text, label=label) for i, (text, label) in enumerate(zip(texts, labels, strict=True))]
    data = load(clips, {}, LABELS, PairsConfig())
    assert data.label.tolist() == [1, 0, -1, -1, 1, 2, -1, 1, 1]
    expected = [0, 0, 1, 0, 2, 3, 4, 5, 5]  # the same words; clips without any are alone
    assert data.script.tolist() == expected
    assert data.before.shape == data.same.shape == (10, 0)


def dialogue():
    """Two dialogues by turns, and a clip of none."""
    said = [("x", "A"), ("y", "C"), ("x", "B"), ("x", "A"), (None, "A"), ("y", "C"), ("x", None), ("x", "B")]
    return [Clip(f"u{i}", text=f"{i}", label="joy", dialogue=d, speaker=s) for i, (d, s) in enumerate(said)]


def test_what_was_said_before():
    data = load(dialogue(), {}, LABELS, PairsConfig(), context=2)
    n = 8
    assert data.before.tolist() == [
        [n, n], [n, n], [0, n], [2, 0], [n, n], [1, n], [3, 2], [6, 3], [n, n],
    ]  # fmt: skip
    yes = {(3, 1), (5, 0)}  # the speaker's own; no name is nobody's
    assert data.same.tolist() == [[(i, p) in yes for p in range(2)] for i in range(n + 1)]


def test_clips_without_a_label_are_left_out(tmp_path):
    clips = lines()
    root(tmp_path, clips)
    clips[4].label, clips[9].label, clips[10].label = None, "pride", "joy"
    data = load(clips, {m: open_features(tmp_path / m) for m in ("audio", "text")}, LABELS, PairsConfig())
    found = data.labelled()
    kept = [i for i in range(24) if i not in (4, 9)]
    assert [clip.id for clip in found.clips] == [clips[i].id for i in kept]
    assert found.label.tolist() == data.label[kept].tolist()
    assert found.script.tolist() == data.script[kept].tolist()
    x, mask = found.gather(torch.arange(23)[None])
    own, there = data.gather(torch.tensor([[*kept, 24]]))
    for m in ("audio", "text"):
        assert torch.equal(x[m], own[m])
        assert torch.equal(mask[m], there[m])
    assert len(data) == 24
    assert found.labelled() is found
    unknown = dialogue()
    unknown[3].label = None
    with pytest.raises(UserError, match="clip 'u3' cannot be left out of its dialogue"):
        load(unknown, {}, LABELS, PairsConfig(), context=1).labelled()
    assert len(load(unknown, {}, LABELS, PairsConfig()).labelled()) == 7


def test_clips_without_a_modality_are_left_out(tmp_path):
    clips = lines()
    made = root(tmp_path, clips)
    made["text"].pop(clips[7].id)
    writer = StoreWriter(tmp_path / "words", {"encoder": "drawn", "dim": 50, "kind": "ids"})
    for id, ids in made["text"].items():
        writer.add(id, ids)
    writer.finish()
    opened = {"audio": open_features(tmp_path / "audio"), "text": open_features(tmp_path / "words")}
    data = load(clips, opened, LABELS, PairsConfig())
    assert data.lacking() == "1 of 24 clips have no audio, 2 of 24 clips have no text"
    found = data.complete()
    kept = [i for i in range(24) if i not in (2, 7)]
    assert [clip.id for clip in found.clips] == [clips[i].id for i in kept]
    x, own = found.gather(torch.arange(22)[None])[0], data.gather(torch.tensor([kept]))[0]
    assert all(torch.equal(x[m], own[m]) for m in x)
    assert found.lacking() == ""
    assert found.complete() is found


def test_features_of_other_clips(tmp_path):
    root(tmp_path, lines())
    opened = {"audio": open_features(tmp_path / "audio")}
    with pytest.raises(UserError) as error:
        load([Clip("x"), Clip("y")], opened, LABELS, PairsConfig())
    assert str(error.value) == f"{tmp_path}/audio: audio of none of the 2 clips, such as 'x'"
    assert len(load([Clip("x"), *lines(1)], opened, LABELS, PairsConfig())) == 3
    assert len(load([], opened, LABELS, PairsConfig())) == 0


def loaded(folder, **cfg):
    clips = lines()
    root(folder, clips)
    return load(clips, {m: open_features(folder / m) for m in ("audio", "text")}, LABELS, PairsConfig(**cfg))


def everything(data):
    x, mask = data.gather(torch.arange(len(data) + 1)[None])
    return {m: [(mask[m][0, i].tolist(), x[m][0, i].tolist()) for i in range(len(data) + 1)] for m in x}


def test_labels_are_dealt_out(tmp_path):
    data = loaded(tmp_path)
    before, label, script = everything(data), data.label.tolist(), data.script.tolist()
    data.deal_labels(5)
    assert Counter(data.label.tolist()) == Counter(label)
    assert data.label.tolist() != label
    assert (everything(data), data.script.tolist()) == (before, script)
    again = load(lines(), {}, LABELS, PairsConfig())
    again.deal_labels(5)
    assert torch.equal(again.label, data.label)
    again.deal_labels(6)
    assert not torch.equal(again.label, data.label)


def test_words_are_dealt_out(tmp_path):
    data = loaded(tmp_path)
    before, label, script = everything(data), data.label.tolist(), data.script.tolist()
    data.deal_words(5)
    after = everything(data)
    assert after["audio"] == before["audio"]
    assert data.label.tolist() == label
    assert after["text"] != before["text"]
    assert after["text"][-1] == before["text"][-1]  # none stays none
    # the scripts go along with the words
    was, now = (sorted(zip(map(str, part["text"][:-1]), s, strict=True))
                for part, s in ((before, script), (after, data.script.tolist())))  # fmt: skip
    assert was == now


def test_frames_are_replaced_by_modality(tmp_path):
    data = loaded(tmp_path)
    before = everything(data)
    called = []

    def transform(m, frames):
        called.append(m)
        return -frames, (frames != 0).any(-1)

    data.standardize(["audio", "video"], transform)
    assert called == ["audio"]
    after = everything(data)
    assert after["text"] == before["text"]
    assert all(torch.equal(torch.tensor(a[1]), -torch.tensor(b[1]))
               for a, b in zip(after["audio"], before["audio"], strict=True))  # fmt: skip


# --- the data of a checkpoint -----------------------------------------------------------------------------------------


def checkpoint_of(folder, **cfg):
    """state.json of a run on a data root, as far as its data go."""
    made = PairsConfig(data_root=str(folder), valid_share=0.2, test_share=0.2, **cfg)
    return {"config": {"data": asdict(made)}, "features": {m: x.info for m, x in pairs.open_stores(made).items()}}


def test_the_data_of_a_checkpoint(tmp_path):
    clips = lines()
    root(tmp_path, clips, audio="frames")
    state = checkpoint_of(tmp_path, max_frames=2)
    store(tmp_path / "text", clips, "ids")  # made since
    made = pairs.split(clips, PairsConfig(valid_share=0.2, test_share=0.2), "list", lambda _: None)
    found = pairs.reopen(state, {}, ["joy", "neutral"], lambda _: None)
    for name, part in found.items():
        assert [clip.id for clip in part.clips] == [clip.id for clip in made[name]]
        assert list(part.parts) == ["audio"]
        assert part.parts["audio"].rows.shape[1] == 2
        assert part.label.tolist() == [{"joy": 0, "neutral": 1}.get(str(clip.label), -1) for clip in part.clips]


def test_a_checkpoint_and_other_data(tmp_path):
    root(tmp_path / "old", lines())
    state = checkpoint_of(tmp_path / "old")
    other = [*lines(2, split="test"), *lines(split="train")[4:]]
    root(tmp_path / "new", other)
    found = pairs.reopen(state, {"data_root": str(tmp_path / "new")}, LABELS, lambda _: None)
    assert [clip.id for clip in found["test"].clips] == [clip.id for clip in other[:4]]

    root(tmp_path / "half", other, audio="frames")
    with pytest.raises(UserError) as error:
        pairs.reopen(state, {"data_root": str(tmp_path / "half")}, LABELS, lambda _: None)
    assert str(error.value) == f"{tmp_path}/half: no store text/, which the checkpoint reads (--stores)"
    write_manifest(tmp_path / "new/one.csv", [Clip("x", label="joy"), Clip("y", split="valid")])
    state["config"]["data"]["test_share"] = 0.0
    moved = {"data_root": str(tmp_path / "new"), "manifest": str(tmp_path / "new/one.csv")}
    with pytest.raises(UserError, match=f"{tmp_path}/new/one.csv: no test clips"):
        pairs.reopen(state, moved, LABELS, nothing)
    state["features"]["text"] = state["features"]["text"] | {"dim": 60}
    with pytest.raises(UserError) as error:
        pairs.reopen(state, {}, LABELS, lambda _: None)
    assert str(error.value) == f"{tmp_path}/old/text: dim is 50, the checkpoint was trained on 60"


# --- sound by speaker -------------------------------------------------------------------------------------------------


def test_sound_is_standardised_by_speaker(tmp_path):
    clips = lines()
    made = root(tmp_path, clips)["audio"]
    for i, clip in enumerate(clips):
        made[clip.id] = made.get(clip.id, torch.zeros(0, DIM))
        clip.speaker = ("x", "y", "y")[i % 3]
    opened = {m: open_features(tmp_path / m) for m in ("audio", "text")}
    raw = load(clips, opened, LABELS, PairsConfig(max_frames=3))
    before = everything(raw)
    data = load(clips, opened, LABELS, PairsConfig(max_frames=3, speaker_norm=True))
    after = everything(data)
    assert after["text"] == before["text"]
    for speaker in "xy":
        own = [i for i, clip in enumerate(clips) if clip.speaker == speaker]
        frames = torch.cat([made[clips[i].id][:3] for i in own]).double()  # of what is not cut
        mean, std = frames.mean(0), (frames - frames.mean(0)).square().mean(0).sqrt()
        for i in own:
            assert after["audio"][i][0] == before["audio"][i][0]  # the same frames are there
            x = made[clips[i].id][:3].double()
            found = torch.tensor(after["audio"][i][1])[: len(x)].double()
            torch.testing.assert_close(found, (x - mean) / std, rtol=1e-5, atol=1e-5)
    assert not any(after["audio"][-1][0])


def test_statistics_of_the_sound_are_standardised_in_its_place(tmp_path):
    clips = lines()
    root(tmp_path, clips, audio="frames", stats="vectors", text="ids")
    opened = pairs.open_stores(PairsConfig(data_root=str(tmp_path)))
    assert list(opened) == ["audio", "stats", "text"]
    before, after = (
        everything(load(clips, opened, LABELS, PairsConfig(speaker_norm=norm))) for norm in (False, True)
    )  # fmt: skip
    assert after["audio"] == before["audio"]
    assert after["text"] == before["text"]
    for v in range(2):
        own = [i for i, clip in enumerate(clips) if clip.speaker == f"v{v}" and before["stats"][i][0] == [True]]
        x, found = (torch.tensor([part["stats"][i][1][0] for i in own]) for part in (before, after))
        torch.testing.assert_close(found, (x - x.mean(0)) / x.std(0, correction=0), rtol=1e-4, atol=1e-4)


def test_a_column_that_never_varies_is_0(tmp_path):
    clips = lines(2)
    made = {clip.id: torch.randn(3, DIM) for clip in clips}
    writer = StoreWriter(tmp_path, {"encoder": "drawn", "dim": DIM})
    for id, x in made.items():
        x[:, 1] = 7.5
        writer.add(id, x)
    writer.finish()
    data = load(clips, {"audio": open_features(tmp_path)}, LABELS, PairsConfig(speaker_norm=True))
    x, mask = data.gather(torch.arange(4)[None])
    assert mask["audio"].all()
    assert not x["audio"][..., 1].any()
    assert x["audio"][..., 0].std() == pytest.approx(1.0, abs=0.1)


def test_broken_values_do_not_spoil_their_speaker(tmp_path):
    clips, generator = lines(6), torch.Generator().manual_seed(0)
    x = torch.randn(12, DIM, generator=generator)
    x[4, 1], x[6, 2] = torch.nan, torch.inf
    writer = StoreWriter(tmp_path, {"encoder": "drawn", "dim": DIM})
    for clip, row in zip(clips, x, strict=True):
        writer.add(clip.id, row)
    writer.finish()
    data = load(clips, {"audio": open_features(tmp_path)}, LABELS, PairsConfig(speaker_norm=True))
    found = data.gather(torch.arange(12)[None])[0]["audio"][0, :, 0]
    assert (~found.isfinite()).nonzero().tolist() == [[4, 1], [6, 2]]
    own = x[0::2].double()
    own = torch.where(own.isfinite(), own, torch.nan)
    expected = (own - own.nanmean(0)) / (own - own.nanmean(0)).square().nanmean(0).sqrt()
    there = expected.isfinite()
    torch.testing.assert_close(found[0::2].double()[there], expected[there], rtol=1e-5, atol=1e-5)


def test_sound_that_cannot_be_standardised_by_speaker(tmp_path):
    clips = lines()
    root(tmp_path, clips)
    opened = {m: open_features(tmp_path / m) for m in ("audio", "text")}
    cfg = PairsConfig(speaker_norm=True)
    clips[5].speaker = "another"
    vectors = store(tmp_path / "vectors", clips, "vectors")
    assert clips[5].id in vectors
    with pytest.raises(UserError) as error:
        load(clips, {"audio": open_features(tmp_path / "vectors")}, LABELS, cfg)
    expected = "--speaker-norm: speaker another has one vector, which cannot be compared with others"
    assert str(error.value) == expected
    clips[5].speaker = None
    with pytest.raises(UserError) as error:
        load(clips, opened, LABELS, cfg)
    assert str(error.value) == "--speaker-norm: clip 's2v1' names no speaker"
    for stores in ({"text": opened["text"]}, {"audio": opened["text"]}):
        with pytest.raises(UserError) as error:
            load(clips, stores, LABELS, cfg)
        assert str(error.value) == "--speaker-norm: there is no sound to standardise"


def test_a_broken_clip_does_not_silence_its_speaker():
    values = torch.randn(4, 3)
    values[0], values[3] = torch.nan, 0.0
    part = Ragged(values, torch.tensor([[0], [1], [2], [3]]))
    pairs.standardize_speakers(part, [Clip(f"c{i}", None, "words", "joy", speaker="s") for i in range(3)])
    assert part.values[1:3].isfinite().all()


def test_a_speaker_of_one_vector_cannot_be_compared():
    part = Ragged(torch.ones(2, 3), torch.tensor([[0], [1]]))
    with pytest.raises(UserError, match="speaker s has one vector"):
        pairs.standardize_speakers(part, [Clip("a", speaker="s")])
