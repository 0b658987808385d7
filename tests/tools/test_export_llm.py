"""Language models exported for transformers and PEFT, which must say what the checkpoint says."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoint, config
from common.config import UserError
from common.weights import identity
from data.prompts import encode_answer
from model import mllm
from model.llm import Llama, LlamaConfig
from model.mllm import MllmConfig
from model.tokenizer import Tokenizer
from tests.qwen import make_qwen
from tests.training import run as run_script
from tools import export

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
QV = ["q_proj", "v_proj"]
LABELS = ["happy", "sad"]


def run(root, form, *argv):
    export.main(config.load(export.Config, ["--format", form, "--ckpt", str(root), *map(str, argv)]))


def make_base(folder, tokenizer, dtype=torch.float32, **changes):
    """A random Llama in the published layout."""
    shape = {"vocab_size": Tokenizer(tokenizer).vocab_size, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    torch.manual_seed(0)
    llm = Llama(LlamaConfig(**shape | changes))
    for parameter in llm.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    llm.to(dtype).save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.model", folder)


def make_run(root, base, full=False, targets=QV, quant="none"):
    """A checkpoint as train_llm.py saves it, whose adapters, or whose whole model, are random numbers."""
    settings = {"llm": str(base), "features": {"voice": 5}, "visual": "patches", "visual_width": 3, "image_size": 56,
                "lora_r": 4, "lora_alpha": 8, "lora_targets": targets, "full": full, "normalize": True,
                "quant": quant}  # fmt: skip
    model, tokenizer = mllm.build(config.from_dict(MllmConfig, settings), torch.float32, CPU)
    torch.manual_seed(5)
    for tensor in checkpoint.trainable_state(model).values():
        tensor.add_(0.1 * torch.randn_like(tensor))
    state = {
        "step": 1, "config": {"model": settings, "data": {"labels": LABELS, "prompt_layout": "train"}},
        "features": {"voice": {"encoder": "logmel"}}, "labels": LABELS, "base": None if full else identity(base),
    }  # fmt: skip
    checkpoint.save(root / "checkpoints", "epoch_001", model, {}, state, mllm.checkpoint_files(model, tokenizer))
    return model.eval()


def ids(llm, n=3):
    return torch.randint(llm.config.vocab_size, (n, 11), generator=torch.Generator().manual_seed(n))


def theirs(model, x):
    with torch.no_grad():
        return model.eval()(x).logits


def check(model, found, atol=1e-4):
    x = ids(model.llm)
    with torch.no_grad():
        torch.testing.assert_close(theirs(found, x), model.llm(x), atol=atol, rtol=0)


def check_beside(model, folder):
    """The multimodal part lies beside, and the README.md's formula is what it does."""
    told = json.loads((folder / "emotorch.json").read_text())
    assert told["data"]["labels"] == LABELS
    assert told["model"]["merge"] == model.cfg.merge
    tensors = load_file(folder / "projections.safetensors")
    assert set(tensors) == {f"{slot}.{leaf}" for slot in ("image", "cls", "voice")
                            for leaf in ("weight", "bias", "mean", "std")}  # fmt: skip
    x = torch.randn(16, 3)
    rows = (x - tensors["image.mean"]) / (tensors["image.std"] * 3**0.5)
    made = rows.reshape(4, 12) @ tensors["image.weight"].T + tensors["image.bias"]
    with torch.no_grad():
        torch.testing.assert_close(made, model.projections["image"](x[None]), atol=1e-5, rtol=0)
    readme = (folder / "README.md").read_text()
    assert "slots image, cls, voice" in readme
    assert "epoch_001" in readme
    assert "{" not in readme
    open_to = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert open_to == {0o666 & ~mask}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", [QV, ["q_proj", "down_proj", "lm_head"]], ids=["qv", "head"])
def test_peft_and_transformers_say_what_the_checkpoint_says(merr, tmp_path, capsys, tie, targets):
    base = tmp_path / "base"
    make_base(base, merr.root / "base", tie_word_embeddings=tie)
    model = make_run(tmp_path / "run", base, targets=targets)
    run(tmp_path / "run", "peft")
    said = capsys.readouterr().out
    place = tmp_path / "run" / "export" / "peft"
    assert said.startswith(f"{place}: peft of {tmp_path}/run/checkpoints/epoch_001 (")
    assert "takes input_ids (B, T)\nmax |difference| of logits: " in said
    given = json.loads((place / "adapter_config.json").read_text())
    assert (given["r"], given["lora_alpha"], given["base_model_name_or_path"]) == (4, 8, str(base))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = theirs(plain, ids(model.llm))
    check(model, peft.PeftModel.from_pretrained(plain, place))
    with torch.no_grad():
        assert (model.llm(ids(model.llm)) - before).abs().max() > 0.05
    check_beside(model, place)

    run(tmp_path / "run", "huggingface")
    place = tmp_path / "run" / "export" / "huggingface"
    merged = transformers.AutoModelForCausalLM.from_pretrained(place)
    check(model, merged)
    assert merged.dtype == torch.float32
    untied = not tie or "lm_head" in targets  # an update of the head is none of the embeddings
    assert ("lm_head.weight" in load_file(place / "model.safetensors")) == untied
    assert merged.config.tie_word_embeddings != untied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) != untied
    check_beside(model, place)
    assert (place / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(place)(ids(model.llm)), model.llm(ids(model.llm)),
                                   atol=1e-4, rtol=0)  # fmt: skip


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_trained_whole_is_a_folder_of_transformers(merr, tmp_path, tie):
    make_base(tmp_path / "base", merr.root / "base", tie_word_embeddings=tie)
    model = make_run(tmp_path / "run", tmp_path / "base", full=True)
    shutil.rmtree(tmp_path / "base")  # it is not needed: the checkpoint holds all
    run(tmp_path / "run", "huggingface", "--out", tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    check(model, merged, 1e-5)
    assert merged.config.tie_word_embeddings == tie
    check_beside(model, tmp_path / "out")
    prompt = torch.tensor([[1, 5, 9]])
    greedy = merged.generate(prompt, max_new_tokens=5, do_sample=False)
    assert greedy.shape[1] > 3
    assert merged.generation_config.eos_token_id == 2
    with pytest.raises(UserError, match="was trained whole, so it has no adapters: --format huggingface"):
        run(tmp_path / "run", "peft")


def test_large_models_come_in_shards(merr, tmp_path, monkeypatch):
    make_base(tmp_path / "base", merr.root / "base")
    model = make_run(tmp_path / "run", tmp_path / "base")
    out = tmp_path / "out"
    monkeypatch.setattr(Llama.save_pretrained, "__defaults__", (None, 60_000))
    run(tmp_path / "run", "huggingface", "--out", out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    shards = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in shards.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 60_000 or len(shards[file]) == 1 for file, size in sizes.items())
    assert not (out / "model.safetensors").exists()
    check(model, transformers.AutoModelForCausalLM.from_pretrained(out))
    (out / "mine.txt").touch()
    monkeypatch.setattr(Llama.save_pretrained, "__defaults__", (None, 10**9))
    run(tmp_path / "run", "huggingface", "--out", out)  # over the shards, which nobody may find again
    assert {file.name for file in out.glob("model*")} == {"model.safetensors"}
    assert (out / "mine.txt").exists()
    check(model, transformers.AutoModelForCausalLM.from_pretrained(out))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_rounded_once_and_said(merr, tmp_path, capsys, dtype):
    make_base(tmp_path / "base", merr.root / "base", dtype=torch.float16)  # as Llama-2 is published
    model = make_run(tmp_path / "run", tmp_path / "base")
    run(tmp_path / "run", "huggingface", "--out", tmp_path / "out", "--dtype", dtype)
    said = capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    moved = float(said.split(f"rounding to {dtype} moved its logits by up to ")[1].splitlines()[0])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    gap = (theirs(merged, ids(model.llm)) - model.llm(ids(model.llm))).abs().max()
    assert 0 < moved < 0.3
    assert gap < 2 * moved
    assert float(said.rsplit(": ", 1)[1]) < 1e-5
    name = "model.layers.1.self_attn.q_proj"
    adapter = model.llm.get_submodule(name)
    merged_weight = (adapter.base.weight + adapter.delta()).to(getattr(torch, dtype))
    assert torch.equal(tensors[f"{name}.weight"], merged_weight)


@pytest.mark.parametrize("form", ["peft", "huggingface"])
def test_adapters_of_a_base_in_few_bits_are_exported_over_the_whole_one(merr, tmp_path, capsys, form):
    make_base(tmp_path / "base", merr.root / "base")
    make_run(tmp_path / "run", tmp_path / "base", quant="int8")
    whole = make_run(tmp_path / "same", tmp_path / "base")  # the same adapters
    run(tmp_path / "run", form, "--out", tmp_path / "out")
    assert "; over the whole language model, though trained over int8\n" in capsys.readouterr().out
    if form == "peft":
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        check(whole, peft.PeftModel.from_pretrained(plain, tmp_path / "out"))
    else:
        check(whole, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("form", ["peft", "huggingface"])
def test_what_differs_is_not_left_behind(merr, tmp_path, monkeypatch, form):
    make_base(tmp_path / "base", merr.root / "base")
    make_run(tmp_path / "run", tmp_path / "base")
    write = export.WRITERS[form]

    def wrong(part, path):
        write(part, path)
        file = next(path.glob("*model.safetensors"))
        tensors = load_file(file)
        name = next(name for name in tensors if "v_proj" in name)
        save_file(tensors | {name: tensors[name] * 1.01}, file, {"format": "pt"})

    monkeypatch.setitem(export.WRITERS, form, wrong)
    with pytest.raises(
        UserError, match=rf"export/{form}: not written, its logits differ by 0\.\d+ from the checkpoint"
    ):
        run(tmp_path / "run", form)
    assert list((tmp_path / "run" / "export").iterdir()) == []

    def without_projection(part, path):
        write(part, path)
        tensors = load_file(path / "projections.safetensors")
        save_file(tensors | {"voice.bias": tensors["voice.bias"] + 1}, path / "projections.safetensors")

    monkeypatch.setitem(export.WRITERS, form, without_projection)
    with pytest.raises(UserError, match=r"projections\.safetensors: voice\.bias was not written as it is"):
        run(tmp_path / "run", form)
    assert list((tmp_path / "run" / "export").iterdir()) == []


def test_mistakes(merr, tmp_path):
    make_base(tmp_path / "base", merr.root / "base")
    make_run(tmp_path / "run", tmp_path / "base")
    (tmp_path / "file").touch()
    for form, argv, says in (
        ("torchscript", [], "a checkpoint of system llm cannot be exported as torchscript (mosei: "),
        ("peft", ["--dtype", "float16"], "--dtype float16: peft is written as it was trained"),
        ("huggingface", ["--dtype", "int8"], "--dtype: 'int8' is not one of float32, float16, bfloat16"),
        (
            "huggingface",
            ["--out", tmp_path / "file"],
            f"--out: {tmp_path}/file is a file, huggingface writes the other",
        ),
        ("peft", ["--llm", tmp_path / "none"], f"language model '{tmp_path}/none' not found"),
    ):
        with pytest.raises(UserError) as error:
            run(tmp_path / "run", form, *argv)
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_a_trained_run_of_qwen2_s_kind(merr, tmp_path):
    """Trained, evaluated, answered by and exported as one of Llama's kind; its checkpoint needs no other tokenizer."""
    import predict
    import train_llm

    base = tmp_path / "base"
    make_qwen(base)
    argv = [*merr.argv, "--llm", base, "--out", tmp_path / "run", "--epochs", 1, "--iters-per-epoch", 2,
            "--batch-size", 2]  # fmt: skip
    assert run_script(train_llm, argv) == 0
    for name in ("vocab.json", "merges.txt"):
        (base / name).unlink()
    folder = checkpoint.resolve(tmp_path / "run")
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "tokenizer.model").exists()
    predictor = predict.load(folder)
    found = predictor(text="we leave today", features={"voice": [1.0] * 5})
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    assert isinstance(predictor(text="we leave", features={"voice": [1.0] * 5}, question="Why?")["answer"], str)
    words = predictor.tokenizer
    assert encode_answer("sad", words.encode)[-1] == words.specials["<|im_end|>"]

    run(tmp_path / "run", "huggingface")
    place = tmp_path / "run" / "export" / "huggingface"
    merged = transformers.AutoModelForCausalLM.from_pretrained(place)
    check(predictor.mllm, merged)
    assert merged.generation_config.eos_token_id == words.eos_id
    again = transformers.AutoTokenizer.from_pretrained(place)
    for text in ("I'm  here 12", "你好\n", "<|im_start|>user\n"):
        assert again.encode(text) == words.encode(text)
    assert again.convert_tokens_to_ids("<|im_end|>") == words.eos_id


@pytest.mark.skipif("EMOTORCH_DATA" not in os.environ, reason="EMOTORCH_DATA names the folder of shared data")
def test_a_trained_run_of_a_published_model(merr, tmp_path):
    """stories260K with LoRA, trained for a moment on clips: the way a user goes."""
    import train_llm

    base = Path(os.environ["EMOTORCH_DATA"], "llama", "stories260K")
    argv = [*merr.argv, "--llm", base, "--model.end_sym", "<s>", "--out", tmp_path / "run", "--epochs", 1,
            "--iters-per-epoch", 6, "--batch-size", 4, "--lr", "2e-2", "--min-lr", "1e-2"]  # fmt: skip
    assert run_script(train_llm, argv) == 0
    for form in ("peft", "huggingface"):
        run(tmp_path / "run", form)
    folder = checkpoint.resolve(tmp_path / "run")
    model, tokenizer, _ = mllm.load(folder, checkpoint.read_state(folder), CPU, torch.float32)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = theirs(plain, ids(model.llm))
    place = tmp_path / "run" / "export"
    merged = transformers.AutoModelForCausalLM.from_pretrained(place / "huggingface")
    check(model, merged)
    check(model, peft.PeftModel.from_pretrained(plain, place / "peft"))
    assert (theirs(merged, ids(model.llm)) - before).abs().max() > 0.01
    assert merged.generation_config.eos_token_id == tokenizer.eos_id == 1
    again = transformers.AutoTokenizer.from_pretrained(place / "huggingface")
    for text in ("Once upon a time", "Don't worry, says: x.", "[INST] <video>"):
        assert again.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert (again.bos_token_id, again.eos_token_id) == (1, 1)
