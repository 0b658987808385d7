"""Heads for MELD on a frozen or a learning classifier: their formulas, the published files, K seeds, dialogues."""

from dataclasses import asdict
from functools import partial
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from common import checkpoint
from common.config import UserError
from data.dialogue import previous, same_speaker
from data.manifest import Clip
from data.pairs import Pairs
from data.resident import Ragged
from evals import speech
from model import meld, slm
from model.clap import MODALITIES, ClapConfig
from model.meld import Before, Meld, MeldConfig
from model.slm import BLOCKS, Slm, SlmConfig
from tests.model.test_slm import CLASSES, DIMS, HIDDEN, WIDTH, close, inputs, published_file, sources, tensors

LABELS = 7
MODES = ("A", "B")
FORMS = ("original", "normalised")


def stage3(form="original", **cfg):
    """Settings of a classifier with everything random that it can have."""
    random = {"dropout": 0.5, "input_dropout": 0.5, "modality_dropout": 0.9}
    return SlmConfig(ClapConfig(proj_dim=WIDTH, dropout=0.5), form, HIDDEN, **(random | cfg))


def build(mode="A", seeds=(3,), form: str | None = "original", dims=DIMS, **cfg):
    """A float64 model in eval mode; nothing that could be zero is, and the frozen part is the same for all seeds."""
    of_stage3, classes = (stage3(form), CLASSES) if form else (None, 0)
    model = Meld(MeldConfig(mode=mode, hidden_dim=HIDDEN, **cfg), sources(dims), LABELS, seeds, of_stage3, classes)
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed + 1000)
        for p in model.parameters():
            p.data[i] += 0.3 * torch.randn(p[i].shape, generator=generator)
    if model.frozen:
        generator = torch.Generator().manual_seed(2000)
        for name, value in model.backbone.named_buffers():
            if not name.startswith(("clap.mean", "clap.std")):
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model.eval().double()


def head(mode, seed=0):
    """Random weights of a published head."""
    generator = torch.Generator().manual_seed(seed)
    width = BLOCKS * WIDTH
    shapes = {
        "A": {"meld_head.0.weight": (width,), "meld_head.0.bias": (width,), "meld_head.1.weight": (HIDDEN, width),
              "meld_head.1.bias": (HIDDEN,), "meld_head.4.weight": (LABELS, HIDDEN), "meld_head.4.bias": (LABELS,)},
        "B": {"adapter.weight": (LABELS, CLASSES), "adapter.bias": (LABELS,)},
    }[mode]  # fmt: skip
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def formula(mode, head, backbone, x_a, x_t):
    """Logits (B, 7) of vectors (B, D), in float64, with weights as the published files name them."""
    weights = {name: value.double() for name, value in (head | backbone).items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    s_a, s_t = linear("clap.audio_proj", x_a), linear("clap.text_proj", x_t)
    s_a, s_t = (s / s.square().sum(-1, keepdim=True).sqrt() for s in (s_a, s_t))
    q, k, v = linear("W_q", s_t), linear("W_k", s_a), linear("W_v", linear("prosody_lin", x_a))
    gate = 1 / (1 + torch.exp(-(q * k).sum(-1, keepdim=True) / WIDTH**0.5))
    x = torch.cat([gate * v, s_a, s_t, s_a * s_t, abs(s_a - s_t)], -1)
    if mode == "B":
        hidden = linear("mlp.0", x)
        logits = linear("mlp.3", hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
        length = logits.square().sum(-1, keepdim=True).sqrt()
        return linear("adapter", logits / length.clamp_min(1e-6))
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    hidden = linear("meld_head.1", x * weights["meld_head.0.weight"] + weights["meld_head.0.bias"])
    return linear("meld_head.4", hidden / (1 + torch.exp(-hidden)))


def own_weights(model, k):
    """The weights of one seed's head, and of the backbone, as the published files name them."""

    def plain(named, k):
        return {name: p[k].flatten() if name.endswith("bias") else p[k] for name, p in named}

    names = plain(model.named_parameters(), k)  # the backbone has none
    return {name.replace("0.scale", "0.weight"): p for name, p in names.items()}, plain(
        model.backbone.named_buffers(), 0
    )


# --- sizes and formulas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "count"), [("A", 3_948_039), ("B", 259)])
def test_the_published_sizes(mode, count):
    with torch.device("meta"):
        dims = {"audio": 768, "text": 768}
        model = Meld(MeldConfig(mode=mode), sources(dims), LABELS, (17, 18), SlmConfig(form="original"), 36)
    assert sum(p[0].numel() for p in model.parameters()) == count
    frozen = {name: b for name, b in model.backbone.named_buffers() if "_proj." in name or not name.startswith("clap.")}
    assert sum(b.numel() for b in frozen.values()) == 6_332_452 + 1_181_184  # once, for both seeds


@pytest.mark.parametrize("mode", MODES)
def test_the_logits_are_the_formulas(mode):
    model = build(mode, (3, 4))
    x, mask = inputs(2)
    out = model(x, mask)
    assert out.shape == (2, 8, LABELS)
    for k in range(2):
        expected = formula(mode, *own_weights(model, k), *(x[m][k, :, 0] for m in MODALITIES))
        close(out[k], expected, 1e-6)  # projections are divided by their length, there by length + 1e-8
    assert not torch.allclose(out[0], out[1])


def test_class_scores_without_a_direction():
    """Logits / max(length, 1e-6): tiny ones are not blown up to length 1."""
    model, (x, mask) = build("B"), inputs()
    for name in ("weight", "bias"):
        model.backbone.mlp[3].get_buffer(name).mul_(1e-9)
    tiny = model.backbone(x, mask)
    assert 0 < tiny.norm(dim=-1).max() < 1e-6
    close(model.features(x, mask), tiny / 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_head_reads_what_stage_3_makes(form):
    """Of frames and hashed words too, statistics and all."""
    parts = sources({"audio": 9, "text": 40}) | {"audio": {"dim": 9, "kind": "dense", "frames": True},
                                                 "text": {"dim": 40, "kind": "ids", "frames": True}}  # fmt: skip
    cfg = SlmConfig(ClapConfig(proj_dim=WIDTH, bag_dim=4), form, HIDDEN)
    theirs = Slm(cfg, parts, CLASSES, (5, 6)).eval()
    theirs.clap.set_statistics("audio", torch.randn(9), torch.rand(9) + 0.5)
    theirs.clap.fronts["text"].set_texts(torch.arange(40.0) * 9)
    for p in theirs.parameters():
        p.data += 0.3 * torch.randn_like(p)
    models = {
        finetune: Meld(MeldConfig(finetune=finetune), parts, LABELS, (3, 4), cfg, CLASSES).eval()
        for finetune in (False, True)
    }
    x = {"audio": torch.randn(1, 6, 5, 9), "text": torch.randint(40, (1, 6, 8), dtype=torch.int32)}
    mask = {m: torch.rand(part.shape[:3]) < 0.7 for m, part in x.items()}

    def features(model, clap, k):
        ready = x | {"audio": clap.standardize("audio", x["audio"])[0]}
        many = ({m: part.expand(k, *part.shape[1:]) for m, part in each.items()} for each in (ready, mask))
        return model.features(*many)

    expected = features(theirs, theirs.clap, 2)[:1]
    assert expected.std(1).min() > 0
    for model in models.values():
        slm.copy(theirs, model.backbone)
        close(features(model, model.fronts, 2), expected.expand(2, -1, -1), 1e-5)


# --- published files --------------------------------------------------------------------------------------------------


def save_head(path, mode, form, weights):
    name = "adapter" if mode == "B" else "meld_head"
    state = {
        "nested": {name: {key.removeprefix(f"{name}."): value for key, value in weights.items()}},
        "flat": weights,
        "module": {f"module.{key}": value for key, value in weights.items()},
    }.get(form)
    rest = {"optimizer_state": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3, "global_step": 9,
            "best_val_acc": 0.6, "config": {"mode": mode, "lr": 1e-3}, "mode": mode}  # fmt: skip
    torch.save(weights if state is None else {"trainable_state": state, **rest}, path)
    return path


@pytest.mark.parametrize("form", ["nested", "flat", "module", "bare"])
@pytest.mark.parametrize("mode", MODES)
def test_a_published_head_and_a_published_classifier(tmp_path, mode, form):
    weights = tensors()
    found, classes, coverage = slm.original(published_file(tmp_path / "slm_stage3_best.pt", weights))
    assert (classes, coverage) == (CLASSES, "16/16 tensors of the SLM")
    cfg = MeldConfig(mode=mode, hidden_dim=HIDDEN)
    model = Meld(cfg, found.clap.sources, LABELS, (3, 4), found.cfg, classes)
    slm.copy(found, model.backbone)
    path = save_head(tmp_path / f"meld_slm_{mode}_best.pt", mode, form, head(mode))
    count = len(head(mode))
    assert meld.load_original(model, path) == f"{count}/{count} tensors of the head"
    model.eval().double()
    x, mask = inputs(2)
    ready = {m: model.fronts.standardize(m, 20 * value.float())[0].double() for m, value in x.items()}
    out = model(ready, mask)
    expected = formula(mode, head(mode), weights, *(ready[m][0, :, 0] for m in MODALITIES))
    for logits in out:
        close(logits, expected, 1e-6)
    assert ready["audio"].abs().max() > 5  # read as it is


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("A", {"meld_head.4.bias": None}, "5/6 tensors match the model; 1 missing: meld_head.4.bias"),
        ("A", {"meld_head.3.weight": torch.ones(2)}, "6/6 tensors match the model; 1 unexpected: meld_head.3.weight"),
        ("A", {"meld_head.0.weight": torch.ones(31)},
         "1 tensors of the wrong shape: meld_head.0.weight is (31,), not (30,)"),
        ("B", {"adapter.weight": torch.ones(LABELS, 36)},
         "1 tensors of the wrong shape: adapter.weight is (7, 36), not (7, 4)"),
        ("B", {"adapter.weight": torch.ones(2, CLASSES), "adapter.bias": torch.ones(2)},
         "2 tensors of the wrong shape: adapter.weight is (2, 4), not (7, 4), adapter.bias is (2,), not (7,)"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit(tmp_path, mode, change, message):
    weights = {name: value for name, value in (head(mode) | change).items() if value is not None}
    path = save_head(tmp_path / "meld.pt", mode, "nested", weights)
    model = build(mode)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError) as error:
        meld.load_original(model, path)
    assert str(error.value) == f"{path}: {message}"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_file_of_the_other_mode_or_of_something_else(tmp_path):
    path = save_head(tmp_path / "meld.pt", "B", "nested", head("B"))
    with pytest.raises(UserError, match=r"meld\.pt: 0/6 tensors match the model; 6 missing: meld_head\.0\.bias, "):
        meld.load_original(build("A"), path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"meld\.pt: not readable as tensors only"):
        meld.load_original(build("A"), path)
    torch.save(head("B"), path)
    with pytest.raises(UserError) as error:
        slm.original(path)
    assert str(error.value) == f"{path}: no clap.audio_proj.weight: not a checkpoint of stage 3"


def test_a_published_classifier_tells_its_shapes(tmp_path):
    path = published_file(tmp_path / "slm.pt", tensors(dims={"audio": 11, "text": 3}, width=8, hidden=10, classes=36))
    found, classes, _ = slm.original(path)
    assert classes == 36
    assert {m: source["dim"] for m, source in found.clap.sources.items()} == {"audio": 11, "text": 3}
    assert (found.cfg.clap.proj_dim, found.cfg.hidden_dim, found.cfg.form) == (8, 10, "original")
    assert not found.training


# --- what is frozen, what learns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_classifier_stays_as_it_is(mode, form):
    """Nothing of it is random, or learns, from the moment that it is made."""
    model = Meld(MeldConfig(mode=mode, dropout=0.0), sources(), LABELS, (3, 4), stage3(form), CLASSES).double()
    assert model.training
    assert not any(part.training for part in model.backbone.modules())
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"adapter" if mode == "B" else "meld_head"}
    x, mask = inputs(2, 64)
    features = model.features(x, mask)
    assert not features.requires_grad
    for way in (model.train(), model.eval(), model.train()):
        assert not any(part.training for part in way.backbone.modules())
        close(way.features(x, mask), features)
    held = set(checkpoint.trainable_state(model))
    assert {f"backbone.{name}" for name, _ in Slm(stage3(form), sources(), CLASSES, (3,)).named_parameters()} <= held
    F.cross_entropy(model(x, mask).flatten(0, 1), torch.arange(128) % LABELS).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_heads_dropout_is_before_its_last_layer():
    model = build("A", dropout=0.5).train()
    x, mask = inputs(n=64)
    assert not torch.allclose(model(x, mask), model(x, mask))
    model.meld_head[-1].weight.data.zero_()
    close(model(x, mask), model(x, mask))
    still = build("B", dropout=0.5).train()  # it has none
    close(still(x, mask), still(x, mask))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_finetuning_trains_the_classifier(mode, form):
    model = build(mode, (3, 4), form, finetune=True)
    assert not model.frozen
    x, mask = inputs(2, 64)
    mask["audio"][:, :5] = False
    mask["text"][:, 5:9] = False
    close(model(x, mask), model(x, mask))
    model.train()
    assert not torch.allclose(model.features(x, mask), model.features(x, mask))  # dropout, hidden modalities
    F.cross_entropy(model(x, mask).flatten(0, 1), torch.arange(128) % LABELS).backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "backbone.clap.logit_scale" not in learning
    unread = ("mlp.", "direct.") if mode == "A" else ()  # class scores are behind the features
    for name, p in model.named_parameters():
        inner = name.removeprefix("backbone.")
        if name in learning and not inner.startswith(unread):
            assert p.grad is not None, name
            assert all(each.any() for each in p.grad), name


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_comes_back(tmp_path, mode, finetune):
    model = build(mode, (3, 4), "normalised", finetune=finetune, context=2).float()
    model.fronts.set_statistics("audio", torch.randn(5), torch.rand(5) + 0.5)
    state = {
        "step": 1, "config": {"model": asdict(model.cfg)}, "sources": sources(), "seeds": [3, 4], "classes": CLASSES,
        "labels": [f"label {i}" for i in range(LABELS)], "stage3": asdict(stage3("normalised")),
    }  # fmt: skip
    folder = checkpoint.save(tmp_path, "epoch_001", model.train(), {}, state, {})
    back, coverage = meld.load(folder, checkpoint.read_state(folder))
    tensors = len(checkpoint.trainable_state(model))
    assert coverage == f"{tensors}/{tensors} tensors"
    assert not back.training
    assert back.frozen == (not finetune)
    model.eval()
    x, mask = inputs(2)
    ours, theirs = (
        {m: each.fronts.standardize(m, value.float())[0] for m, value in x.items()} for each in (model, back)
    )
    assert torch.equal(back(theirs, mask), model(ours, mask))


def test_mode_b_has_nothing_to_read_without_stage_3():
    with pytest.raises(UserError, match=r"^--mode B reads stage 3's class scores: --stage3-ckpt names its checkpoint$"):
        Meld(MeldConfig(mode="B"), sources(), LABELS, (3,))


def test_hashed_words_speak_for_classes_themselves():
    """Without a hidden layer every n-gram has a weight for every class, and there is nothing else."""
    parts = {"text": {"dim": 40, "kind": "ids", "frames": True}}
    cfg = MeldConfig(hidden_dim=0, dropout=0.5)
    model = Meld(cfg, parts, LABELS, (3, 4)).train()
    assert sum(p[0].numel() for p in model.parameters()) == 41 * LABELS
    x = {"text": torch.randint(40, (1, 5, 8), dtype=torch.int32).expand(2, -1, -1)}
    mask = {"text": torch.arange(8) < torch.tensor([8, 5, 3, 1, 0])[:, None].expand(2, 5, 1)}
    out = model(x, mask)
    assert torch.equal(out, model(x, mask))  # no dropout
    close(out[:, :4], model.fronts.vectors(x, mask)["text"][:, :4])
    assert not out[:, 4].any()  # no words, no opinion
    for k, seed in enumerate((3, 4)):
        alone = Meld(cfg, parts, LABELS, (seed,))
        close(alone({"text": x["text"][:1]}, {"text": mask["text"][:1]})[0], out[k])
    with pytest.raises(UserError, match=r"^--hidden-dim 0 reads hashed words only, and audio is vectors$"):
        Meld(cfg, sources() | parts, LABELS, (3,))
    with pytest.raises(UserError, match=r"^--hidden-dim 0 is for hashed words without stage 3$"):
        Meld(cfg, sources(), LABELS, (3,), stage3(), CLASSES)


# --- what is not there, and what is given -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("gone", MODALITIES)
def test_an_absent_modality_is_not_read(form, gone):
    model = build("A", (3, 4), form)
    (x, mask), (other, _) = inputs(2), inputs(2, seed=1)
    mask[gone][:, 1:6] = False
    out = model(x, mask)
    close(model(x | {gone: other[gone]}, mask)[:, 1:6], out[:, 1:6])
    assert not torch.allclose(model(*inputs(2))[:, 1:6], out[:, 1:6])  # it would have counted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gone", MODALITIES)
def test_data_without_one_of_stage_3s_modalities(mode, form, gone):
    """MELD's words alone, say: as if no utterance had the other."""
    model, (x, mask) = build(mode, (3, 4), form), inputs(2)
    expected = model(x, mask | {gone: torch.zeros_like(mask[gone])})
    close(model({m: v for m, v in x.items() if m != gone}, {m: v for m, v in mask.items() if m != gone}), expected)


@pytest.mark.parametrize("mode", MODES)
def test_features_given_are_features_computed(mode):
    model, (x, mask) = build(mode, (3, 4), context=2), inputs(2)
    features = model.features(x, mask)
    there = torch.ones(2, 8, 1, dtype=torch.bool)
    before = Before(*inputs(2, 16, seed=1), torch.ones(2, 8, 2, dtype=torch.bool), torch.rand(2, 8, 2) < 0.5)
    given = Before(
        {"features": model.features(before.x, before.mask)[:, :, None]},
        {"features": torch.ones(2, 16, 1, dtype=torch.bool)}, before.there, before.same,
    )  # fmt: skip
    out = model(x, mask, before)
    assert torch.equal(model({"features": features[:, :, None]}, {"features": there}, given), out)
    assert not torch.allclose(out, model(x, mask))


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "form", "finetune"), [("A", None, False), *product(MODES, FORMS, (False, True))]
)  # fmt: skip
def test_k_seeds_are_k_models(mode, form, finetune):
    """They begin alike, and one does not see another."""
    seeds = (3, 4, 9)
    made = partial(build, mode, form=form, finetune=finetune, context=2)
    together = made(seeds)
    x, mask = inputs(3)
    same = torch.rand(3, 8, 2) < 0.5
    before = Before(*inputs(3, 16, seed=1), torch.ones(3, 8, 2, dtype=torch.bool), same)
    out = together(x, mask, before)
    for i, seed in enumerate(seeds):
        alone = made((seed,))
        for name, p in alone.named_parameters():
            assert torch.equal(p[0], together.get_parameter(name)[i]), name
        own, there = inputs()
        close(out[i], alone(own, there, Before(*inputs(1, 16, seed=1), before.there[:1], same[i : i + 1]))[0])
    assert not torch.allclose(out[0], out[1])


# --- dialogues --------------------------------------------------------------------------------------------------------

SCENES = (5, 1, 6)  # utterances of each dialogue
REACH = 2


def dialogues(seed=0):
    """Utterances of three dialogues among three speakers."""
    clips = [Clip(f"{d}_{u}", dialogue=str(d), speaker=f"{u % 3}") for d, n in enumerate(SCENES) for u in range(n)]
    n = len(clips)
    generator = torch.Generator().manual_seed(seed)
    parts = {
        m: Ragged(torch.cat([torch.randn(n, dim, generator=generator), torch.zeros(1, dim)]).double(),
                  torch.arange(n + 1)[:, None])
        for m, dim in DIMS.items()
    }  # fmt: skip
    before = previous(clips, REACH)
    same = torch.cat([same_speaker(clips, before), torch.zeros(1, REACH, dtype=torch.bool)])
    before = torch.cat([torch.where(before < 0, n, before), torch.full((1, REACH), n)])
    return Pairs(clips, torch.zeros(n).long(), torch.arange(n), parts, before, same)


@pytest.mark.parametrize("form", ["original", None])
def test_only_what_was_just_said_in_the_same_dialogue_matters(form):
    model, data = build("A", (3, 4), form, context=REACH), dialogues()
    out = speech.predict(model, data, 2)
    firsts = [0, 5, 6]
    plain = build("A", (3, 4), form, context=REACH)
    plain.turns = None
    close(out[:, firsts], speech.predict(plain, data, 2)[:, firsts])
    n = len(data)
    for i in range(n):
        other = dialogues()
        for part in other.parts.values():
            part.values[i] *= -2
        changed = (speech.predict(model, other, 2) - out).abs().amax((0, 2)) > 1e-9
        expected = [j for j in range(n) if j == i or i in data.before[j].tolist()]
        assert changed.nonzero().flatten().tolist() == expected
    other = dialogues()
    other.same = ~other.same
    assert not torch.allclose(speech.predict(model, other, 2), out)


def test_nothing_is_learnt_through_what_was_said_before():
    """Else an utterance would be trained towards the emotion of those after it."""
    model, (x, mask) = build("A", (3, 4), None, context=REACH, dropout=0.0).train(), inputs(2)
    said, there = inputs(2, 16, seed=1)
    said = {m: value.clone().requires_grad_() for m, value in said.items()}
    own = {m: value.clone().requires_grad_() for m, value in x.items()}
    before = Before(said, there, torch.ones(2, 8, 2, dtype=torch.bool), torch.rand(2, 8, 2) < 0.5)
    F.cross_entropy(model(own, mask, before).flatten(0, 1), torch.arange(16) % LABELS).backward()
    assert all(value.grad is None for value in said.values())
    assert all(value.grad is not None and value.grad.any() for value in own.values())
    assert model.turns is not None
    assert model.turns.maps.grad is not None
    assert all(each.any() for each in model.turns.maps.grad)
