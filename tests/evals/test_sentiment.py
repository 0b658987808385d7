"""Reports on sentiment: predictions beside the model's own, baselines, intervals, and reports of every head."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import metrics, probe
from common.config import UserError
from data.features import StoreWriter
from data.manifest import EMOTIONS, Clip, write_manifest
from data.mock_mosei import make_mock
from data.mosei import open_corpus
from data.utterances import Utterances, load_splits
from evals import sentiment
from model.fusion import HEADS, Fusion, FusionConfig, masked_mean

DIMS = {"text": 6, "audio": 4, "video": 3}
FRAMES = {"text": 1, "audio": 10, "video": 5}
SIZES = (4, 1, 3, 5, 2, 4)  # utterances of the videos


def utterances(scores=None, sizes=SIZES, kind="score", emotions=None, seed=0, dims=DIMS):
    """Videos one after the other, with drawn frames that say something about the score."""
    n = sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(n, generator=generator) * 4.5).round().clamp(-9, 9) / 3
    score = drawn if scores is None else torch.tensor(scores, dtype=torch.float32)
    values, rows = {}, {}
    for m, dim in dims.items():
        lengths = [0 if m == "video" and i % 4 == 1 else 1 + (3 * i) % FRAMES[m] for i in range(n)]
        signal = (
            torch.linspace(-1, 1, dim) * torch.repeat_interleave(score.nan_to_num(), torch.tensor(lengths))[:, None]
        )
        values[m] = torch.cat([signal + torch.randn(sum(lengths), dim, generator=generator), torch.zeros(1, dim)])
        rows[m] = torch.full((n + 1, FRAMES[m]), sum(lengths))
        for i, length in enumerate(lengths):
            rows[m][i, :length] = sum(lengths[:i]) + torch.arange(length)
    starts = np.cumsum([0, *sizes]).tolist()
    members = [[*range(a, a + size), *[n] * (max(sizes) - size)] for a, size in zip(starts, sizes, strict=False)]
    clips = [Clip(f"v{v}[{u}]", label=f"{score[starts[v] + u]:g}", group=f"v{v}")
             for v, size in enumerate(sizes) for u in range(size)]  # fmt: skip
    known = torch.full((n, 6), torch.nan) if emotions is None else emotions
    return Utterances(clips, kind, score, known, values, rows, torch.tensor(members))


def build(kind="xfuse", head="7", seeds=(3, 4), **cfg):
    model = Fusion(FusionConfig(kind, head, fusion_dim=16, **cfg), DIMS, FRAMES, seeds).eval()
    generator = torch.Generator().manual_seed(0)
    for m, dim in DIMS.items():
        model.set_statistics(m, torch.randn(dim, generator=generator), 0.5 + torch.rand(dim, generator=generator))
    return model


def raw(data, chosen):
    """Padded frames (n, T, D) of each modality, as a user hands them to the model."""
    return {m: part[0] for m, part in data.gather(torch.tensor([chosen]))[0].items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 2048])
@pytest.mark.parametrize("context", ["none", "video"])
def test_predictions_are_the_models(monkeypatch, context, batch):
    monkeypatch.setattr(sentiment, "BATCH", batch)
    model = build(context=context)
    data = utterances()
    videos = [[i for i in row if i < len(data)] for row in data.members.tolist()]
    with torch.no_grad():
        parts = [model(*raw(data, video).values()) for video in videos]
    sentiment.standardize(data, model)
    model.train()
    out = sentiment.predict(model, data)
    assert out.shape == (2, len(data), 7)
    close(out, torch.cat(parts, 1))
    assert model.training  # as it was


@pytest.mark.parametrize("context", ["none", "video"])
@pytest.mark.parametrize("kind", ["mlp", "xfuse"])
def test_a_subset_is_data_without_the_rest(kind, context):
    model = build(kind, context=context)
    whole = utterances()
    sentiment.standardize(whole, model)
    full = sentiment.predict(model, whole)
    for only in sentiment.subsets(list(DIMS)):
        # the features as if they had never been there
        bare = utterances()
        bare.values, bare.rows = ({m: part[m] for m in only} for part in (bare.values, bare.rows))
        sentiment.standardize(bare, model)
        expected = sentiment.predict(model, bare)
        assert list(bare.values) == list(DIMS)
        close(sentiment.predict(model, whole, only), expected)
        asked = utterances()
        sentiment.standardize(asked, model, only)
        close(sentiment.predict(model, asked), expected)
        assert torch.allclose(expected, full, atol=1e-4) == (len(only) == 3)


def test_subsets_are_all_but_none():
    assert sentiment.subsets(["a", "b", "c"]) == [
        ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c"),
    ]  # fmt: skip


def test_missing_frames():
    model = build()
    data = utterances(sizes=(20,) * 10)
    sentiment.standardize(data, model)
    full = sentiment.predict(model, data)
    assert torch.equal(sentiment.predict(model, data, None, 0.0, 1111), full)
    half = sentiment.predict(model, data, None, 0.5, 1111)
    assert not torch.allclose(half, full, atol=1e-3)
    assert torch.equal(sentiment.predict(model, data, None, 0.5, 1111), half)
    assert not torch.allclose(sentiment.predict(model, data, None, 0.5, 1112), half, atol=1e-3)
    close(sentiment.predict(model, data, None, 1.0), sentiment.predict(model, data, ()))  # all frames gone
    assert torch.equal(sentiment.predict(model, data), full)  # the data are as they were


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_the_share_of_missing_frames(rate):
    model = build()
    data = utterances(sizes=(30,) * 20)
    sentiment.standardize(data, model)
    seen = []
    hook = model.core.register_forward_pre_hook(lambda _, args: seen.append(args))
    sentiment.predict(model, data)
    whole = {m: torch.cat([mask[m][0] for _, mask in seen]) for m in DIMS}
    seen.clear()
    sentiment.predict(model, data, None, rate)
    hook.remove()
    for m in DIMS:
        left = torch.cat([mask[m] for _, mask in seen], 1)
        assert torch.equal(left[0], left[1])  # all seeds miss the same
        assert not (left[0] & ~whole[m]).any()
        n = int(whole[m].sum())
        assert left[0].sum() / n == pytest.approx(1 - rate, abs=4 * math.sqrt(rate * (1 - rate) / n))
        values = torch.cat([x[m] for x, _ in seen], 1)
        assert not values[~left].any()


def test_data_that_do_not_fit_the_model():
    model = build()
    with pytest.raises(UserError, match="text has width 5 in the data, 6 in the checkpoint"):
        sentiment.standardize(utterances(dims={"text": 5}), model)
    with pytest.raises(UserError, match="stream 'voice' is not one of text, audio, video"):
        sentiment.standardize(utterances(), model, ["text", "voice"])


def test_longer_sequences_are_cut_to_the_models():
    short = Fusion(FusionConfig("xfuse", fusion_dim=16), DIMS, {"text": 1, "audio": 3, "video": 2}, [0]).eval()
    data = utterances()
    expected = short(*(part[:, : short.frames[m]] for m, part in raw(data, list(range(len(data)))).items()))
    sentiment.standardize(data, short)
    close(sentiment.predict(short, data)[0], expected.detach())


def test_pooled_features_are_means_of_standardised_frames():
    model = build("mlp")
    data = utterances()
    x = raw(data, list(range(len(data))))
    expected = []
    for m, frames in x.items():
        standard, there = model.standardize(m, frames)
        expected.append(torch.stack([f[t].mean(0) if t.any() else torch.zeros(DIMS[m])
                                     for f, t in zip(standard, there, strict=True)]))  # fmt: skip
    sentiment.standardize(data, model)
    close(sentiment.pooled(data), torch.cat(expected, 1))
    assert masked_mean(*[part["video"] for part in data.gather(torch.tensor([[1]]))]).abs().sum() == 0  # none there


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["half_even", "cmu"])
def test_scores_of_classes(scheme):
    sk = pytest.importorskip("sklearn.metrics")
    data = utterances()
    data.score[3] = torch.nan
    logits = torch.randn(len(data), 7, generator=torch.Generator().manual_seed(1))
    found = sentiment.score(logits, data, "7", scheme)
    kept = [i for i in range(len(data)) if i != 3]
    target = data.targets("7", scheme)[kept].numpy()
    answers = logits[kept].argmax(1).numpy()
    assert found["clips"] == len(kept)
    assert found["loss"] == pytest.approx(sk.log_loss(target, logits[kept].double().softmax(1), labels=range(7)))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(target, answers))
    assert found["weighted_f1"] == pytest.approx(sk.f1_score(target, answers, average="weighted", zero_division=0))
    expected = sk.cohen_kappa_score(target, answers, weights="quadratic", labels=range(7))
    assert found["kappa"] == pytest.approx(expected)
    assert found["confusion"] == sk.confusion_matrix(target, answers, labels=range(7)).tolist()
    # the ordered scores are of the true score, not of its class, and of the expectation
    expectation = logits[kept].double().softmax(1) @ torch.arange(-3.0, 4.0).double()
    own = metrics.sentiment(data.score[kept].double(), expectation)
    assert {name: found[name] for name in own} == pytest.approx(own)


def test_scores_of_a_score():
    data = utterances()
    data.score[3] = torch.nan
    kept = [i for i in range(len(data)) if i != 3]
    p = torch.randn(len(data), 1, generator=torch.Generator().manual_seed(1)) * 2
    found = sentiment.score(p, data, "regression", "half_even")
    y, own = data.score[kept].double(), p[kept, 0].double()
    assert found["mae"] == pytest.approx((y - own).abs().mean().item())
    assert found["loss"] == pytest.approx(F.smooth_l1_loss(own, y).item())
    assert found["accuracy"] == found["acc7"]  # levels by the field's rounding
    other = sentiment.score(p, data, "regression", "cmu")
    assert other["accuracy"] != found["accuracy"]
    assert other["acc7"] == found["acc7"]


def test_two_classes_leave_neutral_out():
    data = utterances([1.0, 0.0, -2.0, 0.0, -1.0], sizes=(5,))
    logits = torch.tensor([[0.0, 1], [9, 0], [1, 0], [9, 0], [0, 1]])
    found = sentiment.score(logits, data, "2", "half_even")
    assert found["clips"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["confusion"] == [[1, 1], [0, 1]]
    assert "mae" not in found


def test_scores_of_emotions():
    target = torch.tensor([[1.0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 1], [torch.nan] * 6])
    data = utterances([0.0, 1.0, 2.0], sizes=(3,), emotions=target)
    logits = torch.tensor([[3.0, -1, -2, -1, -1, -1], [-1, -1, -1, -1, -1, 2], [9, 9, 9, 9, 9, 9]])
    found = sentiment.score(logits, data, "emotions", "half_even")
    assert found["clips"] == 2
    y = (target[:2] > 0).float()
    assert found["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits[:2], y).item())
    assert found["accuracy"] == pytest.approx(11 / 12)
    expected = metrics.emotions(y, logits[:2] > 0, EMOTIONS)
    assert found["per_emotion"] == expected["per_emotion"]


@pytest.mark.parametrize(("head", "kind"), [*((head, "score") for head in HEADS), ("2", "polarity")])
def test_columns_are_scores_that_there_are(head, kind):
    data = utterances(kind=kind, emotions=torch.rand(sum(SIZES), 6).round())
    found = sentiment.score(torch.randn(len(data), len(HEADS[head])), data, head, "half_even")
    assert set(sentiment.columns(head, kind)) <= set(found)
    assert all(isinstance(found[name], float) for name in sentiment.columns(head, kind))


# --- baselines --------------------------------------------------------------------------------------------------------


def test_constant_is_the_majority_of_train():
    train = utterances([-1.0] * 5 + [2.0] * 3 + [0.0] * 2 + [math.nan] * 9, sizes=(10, 9))
    test = utterances([2.0, 2.0, 2.0, -1.0, 0.0], sizes=(5,))
    found = sentiment.constant(train, test, "7", "half_even")
    assert found["accuracy"] == 0.2
    assert found["confusion"][5] == [0, 0, 3, 0, 0, 0, 0]  # always -1
    shares = {2: 0.3, -1: 0.5, 0: 0.2}  # the best constant by the loss
    assert found["loss"] == pytest.approx(-sum(math.log(shares[int(y)]) for y in test.score) / 5)
    assert sentiment.constant(train, test, "3", "half_even")["confusion"][0] == [1, 0, 0]
    own = metrics.majority(["p", "p", "p", "n"], ["n", "p"], train=["n"] * 5 + ["p"] * 3)
    assert sentiment.constant(train, test, "2", "half_even")["weighted_f1"] == pytest.approx(own["weighted_f1"])


def test_constant_is_the_median_of_train():
    train = utterances([-3.0, 0.5, 0.5, 2.0, 3.0, math.nan], sizes=(6,))
    test = utterances([1.0, -1.0, 0.5], sizes=(3,))
    found = sentiment.constant(train, test, "regression", "half_even")
    assert found["mae"] == pytest.approx((0.5 + 1.5 + 0.0) / 3)
    assert found["corr"] == 0.0


def test_constant_emotions_are_those_most_often_there():
    given = torch.tensor([[1.0, 0, 2, 0, 0, 0], [3, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0], [torch.nan] * 6])
    train = utterances([0.0] * 4, sizes=(4,), emotions=given)
    test = utterances([0.0] * 2, sizes=(2,), emotions=torch.tensor([[1.0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0]]))
    found = sentiment.constant(train, test, "emotions", "half_even")
    assert found["accuracy"] == pytest.approx(10 / 12)  # always happy and angry
    assert found["per_emotion"]["anger"]["weighted_f1"] == 1.0


@pytest.mark.parametrize("head", ["7", "regression", "emotions"])
def test_the_linear_probe_is_chosen_on_valid(head):
    model = build("mlp", head)
    parts = []
    for seed in range(3):
        scores = utterances(sizes=(10,) * 12, seed=seed).score
        present = (scores[:, None] > torch.linspace(-1, 1, 6)).float()
        parts.append(utterances(sizes=(10,) * 12, seed=seed, emotions=present))
        sentiment.standardize(parts[-1], model)
    train, valid, test = parts
    found = sentiment.linear(train, valid, test, head, "half_even")
    target = train.targets(head, "half_even")[:-1]
    x, losses = sentiment.pooled(train), {}
    for c in (1e-4, 1e-3, 1e-2, 1e-1):
        w, b = probe.fit_head(x, target, head == "regression", head == "emotions", len(HEADS[head]), c)
        pair = [sentiment.pooled(part) @ w.T + b for part in (valid, test)]
        losses[c] = [sentiment.score(z, part, head, "half_even") for z, part in zip(pair, (valid, test), strict=True)]
    best = min(losses, key=lambda c: losses[c][0]["loss"])
    assert found == losses[best][1] | {"c": best}
    assert found["loss"] < sentiment.constant(train, test, head, "half_even")["loss"]


# --- intervals --------------------------------------------------------------------------------------------------------


def classes(right):
    """Data of two classes and logits that are right where asked, videos of one utterance."""
    n = len(right)
    data = utterances([1.0 if i % 2 else -1.0 for i in range(n)], sizes=(1,) * n)
    truth = torch.arange(n) % 2
    answer = torch.where(torch.as_tensor(right), truth, 1 - truth)
    return data, F.one_hot(answer, 2).float()[None]


def test_intervals_are_the_binomials(monkeypatch):
    monkeypatch.setattr(sentiment, "DRAWS", 400)
    data, logits = classes([i % 4 != 0 for i in range(400)])
    found = sentiment.intervals(logits, data, "2", "half_even")
    low, high = found["accuracy"]
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - spread, abs=0.2 * spread)
    assert high == pytest.approx(0.75 + spread, abs=0.2 * spread)
    each = sentiment.score(logits[0], data, "2", "half_even")
    for name, (bottom, top) in found.items():
        assert bottom <= each[name] <= top


def test_intervals_draw_whole_videos(monkeypatch):
    monkeypatch.setattr(sentiment, "DRAWS", 400)
    data, logits = classes([i // 10 % 4 != 0 for i in range(400)])  # right or wrong by tens
    data.members = torch.arange(400).view(40, 10)
    low, high = sentiment.intervals(logits, data, "2", "half_even")["accuracy"]
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 40)
    assert high - low == pytest.approx(2 * spread, rel=0.2)


def test_intervals_draw_seeds(monkeypatch):
    monkeypatch.setattr(sentiment, "DRAWS", 200)
    data, good = classes([True] * 50)
    bad = 1 - good
    found = sentiment.intervals(torch.cat([good, bad]), data, "2", "half_even")
    assert found["accuracy"] == (0.0, 1.0)
    assert sentiment.intervals(good, data, "2", "half_even")["accuracy"] == (1.0, 1.0)


@pytest.mark.parametrize("head", ["7", "regression", "emotions"])
def test_intervals_hold_the_score(monkeypatch, head):
    monkeypatch.setattr(sentiment, "DRAWS", 60)
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(200, 6, generator=generator).round()
    data = utterances(sizes=(4,) * 50, emotions=present)
    logits = torch.randn(1, 200, len(HEADS[head]), generator=generator)
    found = sentiment.intervals(logits, data, head, "half_even")
    each = sentiment.score(logits[0], data, head, "half_even")
    for name in sentiment.columns(head, "score"):
        assert found[name][0] < each[name] < found[name][1]
    assert sentiment.intervals(logits, data, head, "half_even") == found


def test_intervals_beside_videos_without_a_label(monkeypatch):
    """Two of three videos have no target, being neutral or not labelled: some draws would hold those alone."""
    monkeypatch.setattr(sentiment, "DRAWS", 50)
    data = utterances([1.0, -1.0, 0.0, math.nan], sizes=(2, 1, 1))
    logits = torch.tensor([[[0.0, 1], [0, 1], [0, 1], [0, 1]]])
    assert sentiment.score(logits[0], data, "2", "half_even")["accuracy"] == 0.5
    low, high = sentiment.intervals(logits, data, "2", "half_even")["accuracy"]
    assert low <= 0.5 <= high


# --- reports ----------------------------------------------------------------------------------------------------------


def test_summary_is_of_the_population():
    each = [{"mae": 1.0, "clips": 7, "confusion": [[1]]}, {"mae": 3.0, "clips": 7, "confusion": [[2]]}]
    assert sentiment.summary(each) == {"mae": {"mean": 2.0, "std": 1.0}}
    assert sentiment.summary(each[:1])["mae"]["std"] == 0.0


@pytest.fixture(scope="module")
def mock(tmp_path_factory):
    return open_corpus(make_mock(tmp_path_factory.mktemp("mock"), samples=120), say=lambda _: None)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Converted folders by hand: one of emotions, some of them unknown, and one of polarity."""
    folders = {}
    for kind in ("score", "polarity"):
        root = tmp_path_factory.mktemp(kind)
        rng = np.random.default_rng(0)
        clips = []
        for i in range(60):
            strengths = dict(zip(EMOTIONS, np.maximum(0, rng.normal(size=6)).round(2).tolist(), strict=True))
            label = str(i % 2) if kind == "polarity" else f"{rng.integers(-9, 10) / 3:.7g}"
            split = ("train", "train", "valid", "test")[i // 5 % 4]
            clips.append(Clip(f"{i // 5}[{i % 5}]", text="words", label=label, split=split, group=f"{i // 5}",
                              emotions=strengths if i % 7 else {}))  # fmt: skip
        write_manifest(root / "manifest.csv", clips)
        for m, dim in (("text", 5), ("audio", 3)):
            writer = StoreWriter(root / m, {"encoder": "drawn", "dim": dim, "dtype": "float32"})
            for clip in clips:
                writer.add(clip.id, torch.tensor(rng.normal(size=dim), dtype=torch.float32))
            writer.finish()
        (root / "source.json").write_text(json.dumps({"format": "mmsa", "label": kind}))
        folders[kind] = root
    return folders


@pytest.mark.parametrize(
    ("head", "kind", "context"),
    [("7", "mock", "none"), ("3", "mock", "none"), ("2", "mock", "none"), ("regression", "mock", "video"),
     ("emotions", "score", "none"), ("2", "polarity", "none")],
)  # fmt: skip
def test_report(monkeypatch, mock, other, tmp_path, head, kind, context):
    monkeypatch.setattr(sentiment, "DRAWS", 20)
    splits = load_splits(mock if kind == "mock" else other[kind], {}, 0.1, 0, 500, print)
    dims = {m: x.shape[1] for m, x in splits["train"].values.items()}
    model = Fusion(FusionConfig("mlp", head, fusion_dim=16, context=context), dims, dict.fromkeys(dims, 1), [1, 2])
    for m, x in splits["train"].values.items():
        model.set_statistics(m, x[:-1].mean(0), x[:-1].std(0))
    for part in splits.values():
        sentiment.standardize(part, model)
    said = []
    found, logits = sentiment.report(model, splits, "half_even", said.append)
    test = splits["test"]
    assert torch.equal(logits, sentiment.predict(model, test))
    names = sentiment.columns(head, test.kind)
    each = [sentiment.score(one, test, head, "half_even") for one in logits]
    for name in names:
        values = [scores[name] for scores in each]
        assert found["scores"][name]["mean"] == pytest.approx(np.mean(values))
        assert found["scores"][name]["std"] == pytest.approx(np.std(values))
        assert found["missing"]["0.0"][name]["mean"] == pytest.approx(np.mean(values))
    assert list(found["missing"]) == [f"{i / 10}" for i in range(10)]
    assert list(found["modalities"]) == ["+".join(only) for only in sentiment.subsets(list(dims))[:-1]]
    assert found["constant"] == sentiment.constant(splits["train"], test, head, "half_even")
    assert found["clips"] == each[0]["clips"] > 0

    lines = said[0].splitlines()
    assert lines[0] == f"test: {found['clips']} utterances"
    assert lines[1].split() == list(names)
    assert lines[2].split() == ["model,", "2", "seeds", *(f"{found['scores'][n]['mean']:.4f}" for n in names)]
    assert [line.split("  ")[0].strip() for line in lines[6:8]] == ["linear probe", "constant"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert sum("missing" in line for line in lines) == 9

    sentiment.write(tmp_path / "eval", found, logits, test)
    back = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert back["scores"]["loss"]["mean"] == found["scores"]["loss"]["mean"]
    with open(tmp_path / "eval/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [clip.id for clip in test.clips]
    assert (tmp_path / "eval/confusion.png").exists() == (head != "emotions")
    target = test.targets(head, "half_even").tolist()
    for i, row in enumerate(rows):
        z = logits[:, i].double()
        p = (z if head == "regression" else z.sigmoid() if head == "emotions" else z.softmax(-1)).mean(0).tolist()
        assert [float(row[name]) for name in HEADS[head]] == pytest.approx(p, abs=1e-5)
        if head == "regression":
            assert float(row["label"]) == pytest.approx(target[i])
            assert float(row["prediction"]) == pytest.approx(p[0], abs=1e-4)
        elif head == "emotions":
            assert row["label"] == "+".join(e for e in EMOTIONS if test.clips[i].emotions.get(e, 0) > 0)
            assert row["prediction"] == "+".join(e for e, x in zip(EMOTIONS, p, strict=True) if x > 0.5)
        else:
            assert row["label"] == ("" if target[i] < 0 else HEADS[head][target[i]])
            assert row["prediction"] == HEADS[head][int(np.argmax(p))]
