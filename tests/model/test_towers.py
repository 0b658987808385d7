"""Towers by name: which encoder each is, how it is set up, and what is said of a name that is none."""

import pytest
import torch

from common.config import UserError
from model import towers
from model.encoders.beats import Beats
from model.encoders.clip import Clip
from model.encoders.framestats import FrameStats
from model.encoders.logmel import LogMel
from model.encoders.siglip import Siglip
from model.towers import TowerConfig, load_towers
from tests.model.encoders.test_beats import CFG, published

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
         "image_size": 32, "patch_size": 8}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders whose names say what they hold, below one that is called like another tower; and a hub's cache."""
    import transformers as t

    root = tmp_path_factory.mktemp("towers")
    for place in ("siglips/CLIP-vit-tiny", "models--org--clip-tiny/snapshots/0c1d"):
        t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL)).save_pretrained(root / place)
    t.SiglipVisionModel(t.SiglipVisionConfig(**SMALL)).save_pretrained(root / "clips/siglip-tiny")
    (root / "ear").mkdir()
    torch.save({"cfg": CFG, "model": published()}, root / "ear" / "BEATs.pt")
    return root


def load(weights, vision=None, audio=None, **settings):
    vision, audio = (name and str(weights / name) for name in (vision, audio))
    return load_towers(TowerConfig(vision_tower=vision, audio_tower=audio, **settings), CPU)


def test_nothing_is_loaded_unasked():
    assert load_towers(TowerConfig(), CPU) == (None, None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("siglips/CLIP-vit-tiny", Clip), ("clips/siglip-tiny", Siglip), ("models--org--clip-tiny/snapshots/0c1d", Clip)],
)
def test_the_name_says_which_eye_it_is(weights, name, kind):
    eye, ear = load(weights, name)
    assert (type(eye), ear) == (kind, None)
    assert (eye.options["layer"], eye.options["dtype"], eye.resizing) == ("-2", "fp32", "pad")
    assert eye.film([torch.zeros(2, 9, 9, 3, dtype=torch.uint8)]).shape == (2, 16, 16)
    other, _ = load(weights, name, mm_vision_select_layer="1", image_aspect_ratio="square")
    assert (other.options["layer"], other.resizing) == ("1", "squash")


def test_towers_without_weights():
    eye, ear = load_towers(TowerConfig(vision_tower="framestats", audio_tower="logmel", patches=16), CPU)
    assert (type(eye), type(ear)) == (FrameStats, LogMel)
    assert eye.film([torch.zeros(3, 20, 30, 3, dtype=torch.uint8)]).shape == (3, 16, 12)


@pytest.mark.parametrize("name", ["ear", "ear/BEATs.pt"])
def test_a_beats_by_folder_and_by_file(weights, name):
    _, ear = load(weights, audio=name)
    assert (type(ear), ear.options["dtype"]) == (Beats, "fp32")
    assert ear.encode(torch.zeros(16000), "frames").shape == (48, 32)


def test_on_a_gpu_products_are_made_in_bf16():
    assert (towers.dtype(torch.device("cuda", 1)), towers.dtype(CPU)) == ("bf16", "fp32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vision_tower": "google/vit-base"},
            r"^--vision-tower: 'google/vit-base' is not framestats, nor a SigLIP or CLIP, whose name says so$",
        ),
        ({"vision_tower": "google/siglip-x"}, r"hf download google/siglip-x --local-dir weights/google/siglip-x$"),
        ({"vision_tower": "framestats", "patches": 730}, r"^STC reads squares of patches, not 730 a frame"),
        ({"vision_tower": "framestats", "num_frames": 1}, r"^STC joins 2 x 2 x 2 patches: 1 frames of 27 x 27"),
        (
            {"audio_tower": "wav2vec"},
            r"^--audio-tower: beats weights 'wav2vec' not found \(.*\); it is logmel, or a BEATs by file, ",
        ),
    ],
)
def test_names_that_are_none(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(UserError, match=message):
        load_towers(TowerConfig(**settings), CPU)
