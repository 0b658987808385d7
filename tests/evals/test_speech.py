"""Reports on emotion in speech: predictions, scores beside scikit-learn's, baselines, the table and the files."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common import metrics, probe
from data.manifest import Clip
from data.pairs import Pairs
from data.resident import Ragged
from evals import speech
from model.clap import ClapConfig
from model.slm import Slm, SlmConfig
from tests.conftest import drawn

LABELS = ["anger", "joy", "neutral", "sadness"]
DIMS = {"audio": 5, "text": 7}


def ragged(clips, dim):
    """Clips' frames (T, D) back to back, or ids (T,) where dim is 0."""
    lengths = torch.tensor([*map(len, clips), 0])
    none = int(lengths.sum())
    place = torch.arange(int(lengths.max()))
    rows = torch.where(place < lengths[:, None], (lengths.cumsum(0) - lengths)[:, None] + place, none)
    end = torch.zeros(1, dim) if dim else torch.zeros(1, dtype=torch.int32)
    return Ragged(torch.cat([*clips, end]), rows)


def pairs(n=40, seed=0, label=None, signal=1.5, modalities=("audio", "text"), context=0):
    """n clips of one vector each, which says something about the label; every fifth lacks words."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    cues = {m: signal * torch.randn(len(LABELS), dim, generator=fixed) for m, dim in DIMS.items()}
    drawn = torch.multinomial(torch.tensor([0.1, 0.5, 0.25, 0.15]), n, True, generator=generator)
    label = drawn if label is None else torch.tensor(label)
    parts = {}
    for m in modalities:
        x = cues[m][label.clamp_min(0)] + torch.randn(n, DIMS[m], generator=generator)
        parts[m] = ragged([x[i : i + 1][: 0 if m == "text" and i % 5 == 4 else 1] for i in range(n)], DIMS[m])
    clips = [Clip(f"clip{i}", label=LABELS[y] if y >= 0 else None) for i, y in enumerate(label.tolist())]
    before = torch.full((n + 1, context), n)
    for p in range(context):
        before[p + 1 : n, p] = torch.arange(n - p - 1)
    return Pairs(clips, label, torch.arange(n), parts, before, before % 2 == 0)


def splits(**kwargs):
    return {name: pairs(n, i, **kwargs) for i, (name, n) in enumerate({"train": 120, "valid": 40, "test": 40}.items())}


def build(seeds=(3, 4), modalities=("audio", "text")):
    sources = {m: {"dim": DIMS[m], "kind": "dense", "frames": False} for m in modalities}
    return Slm(SlmConfig(clap=ClapConfig(proj_dim=6), hidden_dim=9), sources, len(LABELS), seeds)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", [None, "audio", "text"])
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_predictions_are_the_models(monkeypatch, batch, only):
    monkeypatch.setattr(speech, "BATCH", batch)
    model, data = build().train(), pairs()
    out = speech.predict(model, data, 2, only)
    assert out.shape == (2, 40, len(LABELS))
    assert model.training  # as it was
    model.eval()
    for i in range(40):
        x, mask = data.gather(torch.full((2, 1), i))
        if only is not None:
            other = "text" if only == "audio" else "audio"
            mask[other] = torch.zeros_like(mask[other])
            x[other] = torch.full_like(x[other], 9.0)
        close(out[:, i : i + 1], model(x, mask).detach())


def test_data_of_one_modality_are_data_without_the_other():
    data, bare = pairs(), pairs()
    model = build()
    del bare.parts["text"]
    alone = speech.predict(model, data, 2, "audio")
    lacking = [i for i in range(40) if i % 5 == 4]
    full = speech.predict(model, data, 2)
    close(full[:, lacking], alone[:, lacking])
    assert not torch.allclose(full[:, 0], alone[:, 0])
    assert list(speech.evaluate(model, speech.views(data), LABELS, 2)) == ["fused", "audio", "text"]
    one = build(modalities=("audio",))
    assert list(speech.evaluate(one, speech.views(bare), LABELS, 2)) == ["audio"]


def test_statistics_of_the_sound_are_sound():
    data, model = pairs(), Recorder()
    data.parts["stats"] = ragged(list(torch.ones(40, 1, 3)), 3)
    index = torch.tensor([[3, 4]])
    for only, left in (("audio", {"audio", "stats"}), ("text", {"text"}), (None, {"audio", "stats", "text"})):
        speech.forward(model, data, index, only)
        assert {m for m, part in model.seen[1].items() if part.any()} == left
    assert list(speech.views(data)) == ["fused", "audio", "text"]


class Recorder(nn.Module):
    """Keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, mask, before=None):
        self.seen = x, mask, before
        return torch.zeros(*mask["text"].shape[:2], len(LABELS))


@pytest.mark.parametrize("only", [None, "audio"])
def test_what_was_said_before_goes_along(only):
    data, model = pairs(context=3), Recorder()
    index = torch.tensor([[0, 2, 7], [9, 1, 5]])
    speech.forward(model, data, index, only)
    _, mask, before = model.seen
    assert mask["text"].any() == (only is None)
    assert before.there.tolist() == [[[i > p for p in range(3)] for i in row] for row in index.tolist()]
    assert torch.equal(before.same, data.same[index])
    for k, row in enumerate(index.tolist()):
        for b, i in enumerate(row):
            for p in range(min(i, 3)):
                place, (own, there) = b * 3 + p, data.gather(torch.tensor([[i - p - 1]]))
                for m in DIMS:
                    assert torch.equal(before.x[m][k, place], own[m][0, 0])
                    assert torch.equal(before.mask[m][k, place], there[m][0, 0] & (only in (None, m)))
    speech.forward(model, pairs(), index)
    assert model.seen[2] is None


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores():
    sk = pytest.importorskip("sklearn.metrics")
    data = pairs(60)
    logits = torch.randn(60, len(LABELS), generator=torch.Generator().manual_seed(1)) + F.one_hot(data.label)
    data.label[7] = data.label[20] = -1
    found = speech.score(logits, data.label, LABELS)
    kept = (data.label >= 0).nonzero()[:, 0]
    y, z = data.label[kept].numpy(), logits[kept].double()
    answer = z.argmax(1).numpy()
    assert found["clips"] == 58
    assert found["loss"] == pytest.approx(sk.log_loss(y, z.softmax(1), labels=range(4)))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, answer))
    assert found["uar"] == pytest.approx(sk.balanced_accuracy_score(y, answer))
    for average in ("macro", "weighted"):
        assert found[f"{average}_f1"] == pytest.approx(sk.f1_score(y, answer, average=average, zero_division=0))
    assert found["top5"] == 1.0  # of four
    assert found["confusion"] == sk.confusion_matrix(y, answer, labels=range(4)).tolist()
    parts = sk.precision_recall_fscore_support(y, answer, labels=range(4), zero_division=0)
    for i, label in enumerate(LABELS):
        row = found["per_class"][label]
        assert [row[name] for name in ("precision", "recall", "f1", "support")] == pytest.approx([p[i] for p in parts])


def test_top5_of_many_classes():
    sk = pytest.importorskip("sklearn.metrics")
    labels = [f"class {i:02}" for i in range(9)]
    logits = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    label = torch.arange(200) % 9
    found = speech.score(logits, label, labels)
    assert found["top5"] == pytest.approx(sk.top_k_accuracy_score(label, logits, k=5))
    assert 0.4 < found["top5"] < 0.7


def test_summary_is_of_the_population():
    each = [{"loss": 1.0, "clips": 7, "confusion": [[1]]}, {"loss": 3.0, "clips": 7, "confusion": [[2]]}]
    assert speech.summary(each) == {"loss": {"mean": 2.0, "std": 1.0}}


def test_confused_pairs():
    total = np.array([[5, 3, 0, 0], [7, 1, 2, 0], [0, 1, 9, 0], [0, 0, 0, 4]])
    found = speech.confused(total, LABELS)
    assert [(p["true"], p["said"], p["times"]) for p in found] == [
        ("joy", "anger", 7), ("anger", "joy", 3), ("joy", "neutral", 2), ("neutral", "joy", 1),
    ]  # fmt: skip
    assert [p["share"] for p in found] == pytest.approx([0.7, 3 / 8, 0.2, 0.1])
    assert speech.confused(total, LABELS, 2) == found[:2]
    assert speech.confused(np.diag([1, 2, 3, 4]), LABELS) == []


# --- the linear probe -------------------------------------------------------------------------------------------------


def test_pooled_frames_vectors_and_words(monkeypatch):
    monkeypatch.setattr(speech, "BATCH", 4)
    generator = torch.Generator().manual_seed(0)
    n, lengths = 9, [1, 4, 0, 2, 3, 1, 5, 2, 2]
    frames = [torch.randn(t, 3, generator=generator) for t in lengths]
    vectors = [torch.randn(1, 2, generator=generator) for _ in range(n)]
    words = [torch.randint(2**30, (t,), dtype=torch.int32, generator=generator) for t in lengths[::-1]]
    words[1] = torch.tensor([5, 5, 5 + speech.COUNTS, 6], dtype=torch.int32)
    none = torch.zeros(n + 1, 0)
    clips = [Clip(f"clip{i}") for i in range(n)]

    def pooled(parts, index):
        data = Pairs(clips, torch.zeros(n).long(), torch.arange(n), parts, none.long(), none.bool())
        return speech.pooled(data, torch.tensor(index))

    chosen = [4, 2, 1, 0, 8, 6]
    found = pooled({"audio": ragged(frames, 3), "text": ragged(words, 0)}, chosen)
    assert found.shape == (6, 6 + speech.COUNTS)
    for row, i in zip(found, chosen, strict=True):
        x = frames[i].double()
        mean = x.mean(0) if len(x) else torch.zeros(3).double()
        std = x.std(0, correction=0) if len(x) else mean
        counts = np.bincount(words[i].numpy() % speech.COUNTS, minlength=speech.COUNTS)
        close(row, torch.cat([mean, std, torch.from_numpy(np.log1p(counts))]).float())
    close(pooled({"text": ragged(vectors, 2)}, chosen), torch.cat([vectors[i] for i in chosen]))


def test_the_linear_probe_is_better_than_the_majority():
    sk = pytest.importorskip("sklearn.linear_model")
    parts = splits()
    parts["test"].label[3] = parts["train"].label[5] = -1
    found = speech.linear(parts, "test", LABELS)
    assert found["c"] in (1e-4, 1e-3, 1e-2)
    assert found["clips"] == 119  # that it learnt from
    truth = [LABELS[i] for i in parts["test"].label.tolist() if i >= 0]
    assert found["accuracy"] > metrics.majority(truth, LABELS)["accuracy"] + 0.15

    x, y = {}, {}
    for name, part in parts.items():
        known = (part.label >= 0).nonzero()[:, 0]
        x[name], y[name] = speech.pooled(part, known).double().numpy(), part.label[known].numpy()
    mean, std = x["train"].mean(0), x["train"].std(0, ddof=1)
    x = {name: (part - mean) / std for name, part in x.items()}
    models = {c: sk.LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x["train"], y["train"])
              for c in (1e-4, 1e-3, 1e-2)}  # fmt: skip
    loss = {c: -model.predict_log_proba(x["valid"])[np.arange(40), y["valid"]].mean() for c, model in models.items()}
    best = min(loss, key=loss.__getitem__)
    assert found["c"] == best
    assert found["accuracy"] == pytest.approx(models[best].score(x["test"], y["test"]))
    expected = -models[best].predict_log_proba(x["test"])[np.arange(39), y["test"]].mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-3)


def test_the_linear_probe_of_noise_is_no_better():
    parts = splits(signal=0.0)
    found = speech.linear(parts, "test", LABELS)
    truth = [LABELS[i] for i in parts["test"].label.tolist()]
    assert found["accuracy"] <= metrics.majority(truth, LABELS)["accuracy"] + 0.1


@pytest.mark.parametrize("frames", [False, True])
def test_the_linear_probe_without_a_valid_split(frames):
    parts = splits()
    if frames:
        for name in ("train", "test"):
            generator = torch.Generator().manual_seed(0)
            x = [torch.randn(1 + i % 3, 3, generator=generator) for i in range(len(parts[name]))]
            parts[name].parts["audio"] = ragged(x, 3)
    none = torch.zeros(1, 0)
    empty = {m: Ragged(part.values[-1:], torch.zeros(1, 1).long()) for m, part in parts["test"].parts.items()}
    parts["valid"] = Pairs([], torch.tensor([]), torch.tensor([]), empty, none.long(), none.bool())
    found = speech.linear(parts, "test", LABELS)
    train, test = parts["train"], parts["test"]
    x, new = (speech.pooled(part, torch.arange(len(part))) for part in (train, test))
    weight, bias = probe.fit((x - x.mean(0)) / x.std(0), train.label, len(LABELS), found["c"])
    logits = (new - x.mean(0)) / x.std(0) @ weight.T + bias
    assert found["loss"] == pytest.approx(speech.score(logits, test.label, LABELS)["loss"], rel=1e-4)


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "modalities"), [(2, ("audio", "text")), (1, ("audio",))])
def test_report(tmp_path, seeds, modalities):
    parts = splits(modalities=modalities)
    # joy is the most frequent in train, sadness in test
    parts["test"] = pairs(label=[3] * 20 + [1] * 10 + [0] * 6 + [-1] * 4, seed=5, modalities=modalities)
    model = build(range(seeds), modalities)
    said = []
    found, logits = speech.report(model, parts, LABELS, seeds, "test", said.append, "sound is loud")
    test = parts["test"]
    assert torch.equal(logits, speech.predict(model, test, seeds))
    each = [speech.score(one, test.label, LABELS) for one in logits]
    assert found["per_seed"] == each
    assert (found["split"], found["clips"], found["labels"], found["note"]) == ("test", 36, LABELS, "sound is loud")
    ways = ["fused", "audio", "text"] if len(modalities) > 1 else ["audio"]
    assert list(found["scores"]) == ways
    for way in ways:
        z = speech.predict(model, test, seeds, None if way == ways[0] else way)
        values = [speech.score(one, test.label, LABELS)["weighted_f1"] for one in z]
        assert found["scores"][way]["weighted_f1"]["mean"] == pytest.approx(np.mean(values))
        assert found["scores"][way]["weighted_f1"]["std"] == pytest.approx(np.std(values))
    assert found["majority"]["label"] == "joy"
    assert found["majority"]["accuracy"] == pytest.approx(10 / 36)
    assert found["linear"] == speech.linear(parts, "test", LABELS)
    assert np.array(found["confusion"]).tolist() == np.sum([s["confusion"] for s in each], 0).tolist()
    assert found["confused"] == speech.confused(np.array(found["confusion"]), LABELS)

    lines = said[0].splitlines()
    assert lines[0] == "test: 36 clips; sound is loud"
    assert lines[1].split() == list(speech.MAIN)
    numbers = [f"{found['scores'][ways[0]][name]['mean']:.4f}" for name in speech.MAIN]
    assert lines[2].split()[-5:] == numbers
    assert lines[2].startswith("model, 2 seeds  " if seeds > 1 else "model, 1 seed, audio  ")
    assert sum("std over seeds" in line for line in lines) == (len(ways) if seeds > 1 else 0)
    assert sum(line.startswith("only ") for line in lines) == (2 if len(ways) > 1 else 0)
    (probe,) = (line.split()[2:] for line in lines if line.startswith("linear probe"))
    assert probe == [f"{found['linear'][name]:.4f}" for name in speech.MAIN]
    (major,) = (line.split()[2:] for line in lines if line.startswith("majority (joy)"))
    assert major == [f"{found['majority'][name]:.4f}" for name in speech.MAIN[:-1]]
    classes = lines.index(next(line for line in lines if line.startswith("class")))
    assert [line.split()[0] for line in lines[classes + 1 : classes + 5]] == ["sadness", "joy", "anger", "neutral"]
    assert [line.split()[-1] for line in lines[classes + 1 : classes + 5]] == ["20", "10", "6", "0"]
    recall = np.mean([s["per_class"]["sadness"]["recall"] for s in each])
    assert lines[classes + 1].split()[2] == f"{recall:.4f}"
    worst = found["confused"][0]
    assert f"class: {worst['true']} for {worst['said']} {worst['share']:.0%}" in lines[-1]

    with drawn():
        speech.write(tmp_path / "eval", found, logits, test)
    assert json.loads((tmp_path / "eval/metrics.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "eval/confusion.png").stat().st_size > 1000
    records = [json.loads(line) for line in (tmp_path / "eval/predictions.jsonl").read_text().splitlines()]
    p = logits.double().softmax(-1).mean(0)
    assert [record["id"] for record in records] == [clip.id for clip in test.clips]
    assert [record["label"] for record in records] == [clip.label for clip in test.clips]
    for record, row in zip(records, p, strict=True):
        assert list(record["probabilities"]) == LABELS
        assert list(record["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert record["prediction"] == LABELS[int(row.argmax())]


def test_the_scores_of_a_perfect_model():
    """Nothing is confused, and the report says so by saying nothing."""
    parts = splits()

    class Perfect(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x, mask):
            return 9.0 * F.one_hot(parts["test"].label, len(LABELS))[None].float()

    said = []
    found, _ = speech.report(Perfect(), parts, LABELS, 1, "test", said.append)
    assert found["scores"]["fused"]["accuracy"]["mean"] == 1.0
    assert found["confused"] == []
    assert "confused" not in said[0]
    assert said[0].startswith("test: 40 clips\n")
