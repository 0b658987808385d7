import json
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from common import checkpoint, config
from common.config import UserError
from model import clap, fusion
from model.clap import Clap, ClapConfig
from model.fusion import Fusion, FusionConfig
from tools import export

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
ROOT = Path(export.__file__).parents[1]
NETWORKS = ("torchscript", "torch_export", "safetensors")
GUIDE = {"text": 768, "audio": 768, "video": 25}
SMALL = {"text": 12, "audio": 10, "video": 5}


def make_run(root, model="mlp", dims=SMALL, frames=1, seeds=1, best=(0.5,), metric="loss", **more):
    """A run folder with one checkpoint of an untrained Fusion; text has at most 6 frames, audio and video `frames`."""
    cfg = FusionConfig(model=model, fusion_dim=16, layers=1, **more)
    lengths = {m: min(frames, 6) if m == "text" else frames for m in dims}
    net = Fusion(cfg, dims, lengths, range(42, 42 + seeds))
    for i, (m, dim) in enumerate(dims.items()):
        spread = torch.rand(dim) + 0.5 + i
        spread[0] = 0  # a column that never varies
        net.set_statistics(m, torch.randn(dim), spread)
    state = {
        "system": "mosei", "step": 3, "dims": dims, "frames": lengths, "seeds": list(range(42, 42 + seeds)),
        "labels": list(fusion.HEADS[cfg.head]), "config": {"model": asdict(cfg), "metric": metric},
        "watches": [{"best": value} for value in best],
    }  # fmt: skip
    checkpoint.save(root / "checkpoints", "best_001", net, {}, state, {}, ("best",))
    return net.eval()


def run(root, *argv):
    export.main(config.load(export.Config, ["--ckpt", str(root), *argv]))


def read(path, form):
    """The exported model as somebody else would open it."""
    if form == "torchscript":
        return torch.jit.load(path)
    if form == "torch_export":
        return torch.export.load(path).module()
    return fusion.load(path, json.loads((path / "config.json").read_text()))[0]


def rows(net, n):
    return [torch.randn(n, *([] if net.frames[m] == 1 else [net.frames[m]]), dim) for m, dim in net.dims.items()]


def check(net, again, pick=lambda logits: logits):
    """Same logits for one row and five, with each modality absent, and with frames missing."""
    with torch.no_grad():
        for n in (1, 5):
            x = rows(net, n)
            cases = [x, *([v * (i != gone) for i, v in enumerate(x)] for gone in range(len(x)))]
            if x[1].ndim == 3:
                cases.append([x[0], torch.cat([x[1][:, :2], torch.zeros_like(x[1][:, 2:])], 1), *x[2:]])
            for case in cases:
                torch.testing.assert_close(again(*case), pick(net(*case)), atol=1e-5, rtol=0)


# torch.export takes seconds a network: it has one here, others with context and with several seeds
SHAPES = [("mlp", 1), ("mlp", 6), ("xfuse", 1), ("xfuse", 12)]
CASES = [(*shape, form) for shape in SHAPES for form in NETWORKS if form != "torch_export" or shape == ("mlp", 6)]


@pytest.mark.parametrize(("model", "frames", "form"), CASES)
def test_the_file_gives_the_checkpoints_logits(tmp_path, capsys, model, frames, form):
    net = make_run(tmp_path, model, frames=frames)
    run(tmp_path, "--format", form)
    check(net, read(tmp_path / "export" / export.FORMATS[form], form))
    said = capsys.readouterr().out.splitlines()
    assert float(said[-1].removeprefix("max |difference| of logits: ")) <= 1e-5
    assert [path.name for path in (tmp_path / "export").iterdir()] == [export.FORMATS[form]]


@pytest.mark.parametrize("form", ["torchscript", "torch_export"])
def test_with_context_the_rows_are_a_video_of_any_length(tmp_path, form):
    net = make_run(tmp_path, "xfuse", {"text": 12, "audio": 10}, frames=12, context="video")
    run(tmp_path, "--format", form)
    again = read(tmp_path / "export" / export.FORMATS[form], form)
    check(net, again)
    x = rows(net, 4)
    alone = torch.cat([again(*(v[i : i + 1] for v in x)) for i in range(4)])
    assert not torch.allclose(again(*x), alone, atol=1e-3)


def test_the_guides_snippet_works_on_the_traced_mlp(tmp_path):
    make_run(tmp_path, "mlp", GUIDE)
    run(tmp_path, "--out", str(tmp_path / "model_deploy.pt"))
    extra = {"config.json": ""}
    model = torch.jit.load(tmp_path / "model_deploy.pt", _extra_files=extra)
    assert model(torch.randn(1, 768), torch.randn(1, 768), torch.randn(1, 25)).shape == (1, 7)
    facts = json.loads(extra["config.json"])
    assert facts["dims"] == GUIDE
    assert facts["labels"] == list(fusion.SENTIMENTS)


@pytest.mark.parametrize(("metric", "best"), [("loss", (0.7, 0.2, 0.9)), ("uar", (0.3, 0.8, 0.5))])
def test_the_seed_with_the_best_valid_score_is_exported(tmp_path, metric, best):
    net = make_run(tmp_path, "xfuse", seeds=3, best=best, metric=metric)
    run(tmp_path)
    check(net, read(tmp_path / "export" / "torchscript.pt", "torchscript"), lambda logits: logits[1])


@pytest.mark.parametrize("form", NETWORKS)
def test_one_seed_or_all(tmp_path, form):
    net = make_run(tmp_path, "mlp", seeds=3, best=(0.7, 0.2, None))
    out = tmp_path / export.FORMATS[form]
    if form != "torch_export":
        run(tmp_path, "--format", form, "--seed-index", "2", "--out", str(out))
        check(net, read(out, form), lambda logits: logits[2])
    run(tmp_path, "--format", form, "--seed-index", "all", "--out", str(out))  # over the first
    check(net, read(out, form))


def test_a_modality_the_data_lack_is_no_input(tmp_path, capsys):
    net = make_run(tmp_path, "xfuse", {"text": 12, "video": 5}, head="regression")
    run(tmp_path)
    assert "takes text (B, 12), video (B, 5)" in capsys.readouterr().out
    assert torch.jit.load(tmp_path / "export" / "torchscript.pt")(*rows(net, 3)).shape == (3, 1)


def test_a_file_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    net = make_run(tmp_path)
    before = net.classifier.bias.clone()

    def wrong(part, path):
        with torch.no_grad():
            part.model.classifier.bias += 1e-4
            export._write_torchscript(part, path)
            part.model.classifier.bias.copy_(before)

    monkeypatch.setitem(export.WRITERS, "torchscript", wrong)
    with pytest.raises(UserError, match=r"torchscript\.pt: not written, its logits differ by 0\.0001"):
        run(tmp_path)
    assert list((tmp_path / "export").iterdir()) == []


def test_mistakes_are_named(tmp_path):
    make_run(tmp_path, seeds=2, best=(0.1, 0.2))
    checkpoint.save(tmp_path / "other", "step_001", torch.nn.Linear(1, 1), {}, {"step": 1, "system": "slm"}, {})
    (tmp_path / "file").write_text("")
    for argv, said in [
        (["--ckpt", "nowhere"], "checkpoint nowhere: not found"),
        (
            ["--ckpt", str(tmp_path / "other")],
            r"a checkpoint of system slm cannot be exported as torchscript "
            r"\(mosei: torchscript, torch_export, safetensors; clap: projectors; llm: peft, huggingface\)",
        ),
        (["--seed-index", "2"], "--seed-index: '2' is not best, all or 0 to 1"),
        (["--seed-index", "first"], "'first' is not best"),
        (["--format", "onnx"], "torchscript, torch_export, safetensors"),
        (["--format", "projectors"], "a checkpoint of system mosei cannot be exported as projectors"),
        (["--format", "safetensors", "--out", str(tmp_path / "file")], "is a file, safetensors writes the other"),
        (["--out", str(tmp_path)], "is a folder, torchscript writes the other"),
        (["--format", "torch_export", "--out", "model.pt"], r"model\.pt must end in \.pt2"),
        (["--out", str(tmp_path / "file" / "x.pt")], "cannot be written"),
        (["--device", "abacus"], "'abacus' is not a device"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            run(tmp_path, *argv)
        assert "\n" not in str(error.value)


VECTORS = {m: {"dim": dim, "kind": "dense", "frames": False} for m, dim in (("audio", 12), ("text", 10))}


def make_projectors(root, sources=VECTORS, normalize=True):
    """A run folder with one checkpoint of three seeds' untrained projectors; the second is the best."""
    cfg = ClapConfig(proj_dim=8, bag_dim=4, normalize=normalize)
    net = Clap(cfg, sources, range(3))
    if normalize:
        for m in net.dense:
            spread = torch.rand(sources[m]["dim"]) + 0.5
            spread[0] = 0  # a column that never varies
            net.set_statistics(m, 3 * torch.randn(len(spread)), spread)
    state = {
        "system": "clap", "step": 3, "sources": sources, "seeds": [5, 6, 7],
        "config": {"model": asdict(cfg), "metric": "r1"}, "watches": [{"best": value} for value in (0.1, 0.3, 0.2)],
        "features": {m: {"encoder": "drawn"} for m in sources},
    }  # fmt: skip
    checkpoint.save(root / "checkpoints", "best_001", net, {}, state, {}, ("best",))
    return net.eval()


def unit_vectors(net, x):
    """What the checkpoint makes of raw embeddings."""
    ready = {m: net.standardize(m, v)[0][:, None].expand(3, -1, -1, -1) for m, v in x.items()}
    return net(ready, {m: torch.ones(3, len(v), 1, dtype=torch.bool) for m, v in x.items()})


def fresh(normalize=False):
    """Projectors that something is loaded into."""
    return Clap(ClapConfig(proj_dim=8, normalize=normalize), VECTORS, [0]).eval()


@pytest.mark.parametrize("file", [None, "clap_projectors.pt", "mine.safetensors"])
@pytest.mark.parametrize("normalize", [True, False])
def test_projectors_read_raw_embeddings_as_the_checkpoint_does(tmp_path, capsys, file, normalize):
    net = make_projectors(tmp_path, normalize=normalize)
    path = tmp_path / "export" / (file or "clap_projectors.safetensors")
    run(tmp_path, "--format", "projectors", *(["--out", str(path)] if file else []))
    said = capsys.readouterr().out
    assert ("do not cut embeddings beyond 5 deviations" in said) == normalize
    assert float(said.rpartition(": ")[2]) <= 1e-5
    again = fresh()
    assert clap.load_original(again, path) == "4/4 tensors of the projectors"
    means = {m: net.get_buffer(f"mean_{m}") for m in VECTORS}
    x = {m: mean + 0.5 * torch.randn(9, len(mean)) for m, mean in means.items()}
    with torch.no_grad():
        found, expected = again({m: v[None, :, None] for m, v in x.items()}, {}), unit_vectors(net, x)
    for m in VECTORS:
        torch.testing.assert_close(found[m][0], expected[m][1], atol=1e-5, rtol=0)


def test_a_pt_file_of_projectors_has_the_published_layout(tmp_path):
    net = make_projectors(tmp_path, normalize=False)
    run(tmp_path, "--format", "projectors", "--seed-index", "2", "--out", str(tmp_path / "p.pt"))
    content = torch.load(tmp_path / "p.pt", weights_only=True)
    assert list(content) == ["audio_proj", "text_proj"]
    assert all(list(part) == ["weight", "bias"] for part in content.values())
    assert torch.equal(content["text_proj"]["weight"], net.get_parameter("text_proj.weight")[2])
    assert torch.equal(content["audio_proj"]["bias"], net.get_parameter("audio_proj.bias")[2, 0])


def test_mistakes_with_projectors_are_named(tmp_path):
    for argv, said in [
        ([], "a checkpoint of system clap cannot be exported as torchscript"),
        (["--format", "projectors", "--seed-index", "all"], "a file of projectors holds those of one seed"),
        (["--format", "projectors", "--out", "p.onnx"], r"p\.onnx must end in \.safetensors or \.pt"),
    ]:
        make_projectors(tmp_path)
        with pytest.raises(UserError, match=said):
            run(tmp_path, *argv)
    for name, source in (("ids", {"dim": 50, "kind": "ids", "frames": True}),
                         ("frames", {"dim": 8, "kind": "dense", "frames": True})):  # fmt: skip
        make_projectors(tmp_path / name, VECTORS | {"text" if name == "ids" else "audio": source})
        with pytest.raises(UserError, match="frames and hashed words go through more than a linear map"):
            run(tmp_path / name, "--format", "projectors")


def test_projectors_as_the_first_word_by_path(tmp_path):
    make_projectors(tmp_path / "run")
    argv = [sys.executable, str(ROOT / "tools" / "export.py"), "projectors", "--ckpt", str(tmp_path / "run")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path}/run/export/clap_projectors.safetensors: projectors, seed 6 of ")
    assert done.stderr == ""


@pytest.mark.filterwarnings("ignore:.tools.export. found in sys.modules")
def test_it_runs_as_a_module(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["export.py", "--ckpt", str(tmp_path / "run")])
    runpy.run_module("tools.export", run_name="__main__")
    said = capsys.readouterr()
    assert "max |difference|" in said.out
    assert said.err == ""
    monkeypatch.setattr(sys, "argv", ["export.py", "--ckpt", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tools.export", run_name="__main__")
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
