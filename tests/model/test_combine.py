"""Several checkpoints as one model: means against float64, ensembles against single runs and loops without a cache."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoint, config
from common.config import UserError
from common.weights import identity
from data.clips import ClipData, DataConfig, Features, load_test
from model import combine, mllm
from model.combine import Ensemble, sibling
from model.lora import adapters
from model.mllm import MllmConfig, pack

CPU = torch.device("cpu")
CANDIDATES = [[5, 6, 2], [7, 2], [5, 9, 2]]


@pytest.fixture(scope="module", params=["lora", "full", "int8"])
def checkpoints(request, merr, tmp_path_factory):
    """Three checkpoints of a recipe, filled with numbers that are far apart, as train_llm.py saves them."""
    root = tmp_path_factory.mktemp(request.param)
    settings = merr.config["model"] | {"full": request.param == "full", "normalize": True}
    settings |= {"quant": "int8"} if request.param == "int8" else {}
    cfg = config.from_dict(MllmConfig, settings)
    folders = []
    for number in range(3):
        model, tokenizer = mllm.build(cfg, torch.float32, CPU)
        torch.manual_seed(number + 1)
        for name, tensor in checkpoint.trainable_state(model).items():
            tensor.add_(torch.randn_like(tensor).abs() if name.endswith("std") else 0.2 * torch.randn_like(tensor))
        state = {
            "step": number, "config": {"model": settings, "data": merr.config["data"]}, "labels": merr.labels,
            "features": {"voice": {"encoder": "voice"}}, "base": None if cfg.full else identity(cfg.llm),
        }  # fmt: skip
        files = mllm.checkpoint_files(model, tokenizer)
        folders.append(checkpoint.save(root / "checkpoints", f"epoch_{number:03d}", model, {}, state, files))
    return folders


def load(folders, how):
    return combine.load(folders, [checkpoint.read_state(folder) for folder in folders], how, CPU, torch.float32)


def single(folder):
    return mllm.load(folder, checkpoint.read_state(folder), CPU, torch.float32)[0]


@pytest.fixture(scope="module")
def batch(merr):
    """Prompts of clips with and without words, a voice and a picture."""
    cfg = config.from_dict(MllmConfig, merr.config["model"])
    data = config.from_dict(DataConfig, merr.config["data"])
    _, tokenizer = mllm.build(cfg, torch.float32, CPU)
    clips = ClipData(load_test(data, lambda _: None), Features(cfg.rows(), cfg.visual, data), data, tokenizer.encode)
    return pack([clips.sample(i) for i in range(5)], cfg, answers=False)


def logits(model, prompt, answer):
    """Of the next token after each sample's prompt and these tokens, without a cache."""
    x = torch.cat([prompt, model.llm.embed(torch.tensor(answer, dtype=torch.long))])
    return model.llm(inputs_embeds=x[None])[0, -1]


def test_the_mean_of_weights_is_the_float64_mean_of_updates(checkpoints):
    model, _, coverage = load(checkpoints, "weights")
    parts = [load_file(folder / checkpoint.MODEL) for folder in checkpoints]
    found = adapters(model.llm)
    for name, adapter in found.items():
        updates = [
            part[f"llm.{name}.lora_B.weight"].double() @ part[f"llm.{name}.lora_A.weight"].double() * (8 / 4)
            for part in parts
        ]
        mean = sum(updates) / 3
        assert adapter.scaling == 8 / 4
        assert adapter.lora_A.weight.shape[0] == 3 * 4
        assert (adapter.delta().double() - mean).abs().max() < 1e-6
        assert mean.abs().max() > 0.1
    own = checkpoint.trainable_state(model)
    others = [name for name in parts[0] if ".lora_" not in name]
    assert {"projections.voice.weight", "projections.voice.std", "projections.image.mean"} <= set(others)
    for name in others:
        mean = sum(part[name].double() for part in parts) / 3
        assert (own[name].double() - mean).abs().max() < 1e-6, name
    kind = f"{len(own)}/{len(own)}" if not found else f"{2 * len(found)}/{2 * len(found)} LoRA tensors"
    assert kind in coverage or not found


def test_one_checkpoint_twice_is_that_checkpoint(checkpoints, batch):
    alone = single(checkpoints[1])
    with torch.inference_mode():
        scores, ids = alone.score(batch, CANDIDATES), alone.generate(batch, 6, eos_id=2)
        for how in combine.WAYS:
            twice, _, _ = load([checkpoints[1]] * 2, how)
            assert (twice.score(batch, CANDIDATES) - scores).abs().max() < 1e-6
            assert twice.generate(batch, 6, eos_id=2) == ids


def test_an_ensemble_scores_the_mean_of_its_members(checkpoints, batch):
    together, _, _ = load(checkpoints, "predictions")
    with torch.inference_mode():
        each = [single(folder).score(batch, CANDIDATES).double() for folder in checkpoints]
        found = together.score(batch, CANDIDATES)
    assert (found.double() - sum(each) / 3).abs().max() < 1e-6
    assert (each[0] - each[1]).abs().max() > 0.01
    torch.testing.assert_close(found.sum(1), torch.ones(5))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_an_ensemble_generates_as_a_loop_of_full_forwards_does(checkpoints, batch, penalty):
    """Greedy, by the mean of the members' probabilities; the penalty acts on each member's logits."""
    together, _, _ = load(checkpoints, "predictions")
    members = [single(folder) for folder in checkpoints]
    eos, expected = 2, []
    with torch.inference_mode():
        for prompts in zip(*(member.prompts(batch) for member in members), strict=True):
            answer: list[int] = []
            for _ in range(7):
                mean = torch.zeros(together.members[0].llm.config.vocab_size, dtype=torch.float64)
                for member, prompt in zip(members, prompts, strict=True):
                    z = logits(member, prompt, answer).double()
                    for token in set(answer):
                        z[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
                    mean += z.softmax(-1) / 3
                token = int(mean.argmax())
                if token == eos:
                    break
                answer.append(token)
            expected.append(answer)
        found = together.generate(batch, 7, repetition_penalty=penalty, eos_id=eos)
        alone = [member.generate(batch, 7, repetition_penalty=penalty, eos_id=eos) for member in members]
    assert found == expected
    assert found not in alone


def test_an_ensemble_draws_from_the_mean_of_its_members(checkpoints, batch):
    """At temperature 1 first tokens come as often as the members' mean probability says."""
    together, _, _ = load(checkpoints, "predictions")
    members = [single(folder) for folder in checkpoints]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        prompts = [member.prompts(batch)[0] for member in members]
        each = torch.stack([logits(m, p, []).softmax(-1) for m, p in zip(members, prompts, strict=True)])
        mean = each.mean(0)
        one = [(m.llm, [p] * 1000) for m, p in zip(members, prompts, strict=True)]
        drawn = combine.generate_together(one, 1, temperature=1.0, generator=generator)
        nucleus = combine.generate_together(one, 1, temperature=1.0, top_p=0.2, generator=generator)
        again = [together.generate(batch, 5, temperature=0.7, generator=torch.Generator().manual_seed(3))
                 for _ in range(2)]  # fmt: skip
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(mean)) / 1000
    distance, *others = 0.5 * (counts - torch.cat([mean[None], each])).abs().sum(1)
    assert distance < min(others) - 0.02
    best = mean.sort(descending=True).indices[: int((mean.sort(descending=True).values.cumsum(0) < 0.2).sum()) + 1]
    assert {row[0] for row in nucleus} <= set(best.tolist())
    assert again[0] == again[1]


def test_nothing_to_do_and_no_beams(checkpoints, batch):
    together, _, _ = load(checkpoints[:2], "predictions")
    assert together.generate(batch, 0) == [[]] * 5
    with pytest.raises(UserError, match="num_beams: 2, but several models decode together greedily or by sampling"):
        together.generate(batch, 3, num_beams=2)


def test_members_share_what_did_not_train(checkpoints):
    together, _, _ = load(checkpoints, "predictions")
    first, *others = together.members
    own = checkpoint.trainable_state(first)
    for other in others:
        for (name, mine), (_, theirs) in zip(first.named_parameters(), other.named_parameters(), strict=True):
            assert (mine is theirs) == (name not in own)
        assert other.llm.lm_head.weight is other.llm.model.embed_tokens.weight
        for (name, mine), (_, theirs) in zip(first.named_buffers(), other.named_buffers(), strict=True):
            assert (mine is theirs) == (name not in own)  # a base of few bits is buffers
    frozen = sum(p.numel() for name, p in first.named_parameters() if name not in own)
    trained = sum(p.numel() for name, p in first.named_parameters() if name in own)
    assert sum(p.numel() for p in together.parameters()) == frozen + 3 * trained
    assert first.cfg.full == (frozen == 0)


def changed(folder, tmp_path, change):
    """A copy of a checkpoint whose state.json `change` edits."""
    copy = shutil.copytree(folder, tmp_path / "other")
    state = json.loads((copy / "state.json").read_text())
    change(state)
    (copy / "state.json").write_text(json.dumps(state))
    return copy


@pytest.mark.parametrize("how", combine.WAYS)
@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("model", "lora_r", 8, "model.lora_r is 8, not 4"),
        ("model", "lora_targets", ["q_proj"], "model.lora_targets is q_proj, not q_proj,v_proj"),
        ("model", "features", {"voice": 6}, "model.features is voice=6, not voice=5"),
        ("model", "normalize", False, "model.normalize is false, not true"),
        ("model", "end_sym", "<s>", "model.end_sym is <s>, not </s>"),
        ("data", "labels", ["sad", "happy", "neutral", "angry"], "data.labels is sad,happy,neutral,angry, not "
         "happy,sad,neutral,angry"),
        ("data", "prompt_layout", "question_first", "data.prompt_layout is question_first, not train"),
        ("data", "question", "guide", "data.question is guide, not labels"),
        ("data", "speaker_norm", True, "data.speaker_norm is true, not false"),
    ],
)  # fmt: skip
def test_checkpoints_of_different_recipes_do_not_combine(checkpoints, tmp_path, how, section, key, value, says):
    first = checkpoints[0]
    other = changed(first, tmp_path, lambda state: state["config"][section].update({key: value}))
    with pytest.raises(UserError) as error:
        load([first, other], how)
    assert str(error.value) == f"{other} does not combine with {first}: {says}"


def test_other_files_do_not_combine(checkpoints, tmp_path):
    first = checkpoints[0]

    def refused(change=lambda state: None, edit=lambda folder: None):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        other = changed(first, tmp_path, change)
        edit(other)
        with pytest.raises(UserError) as error:
            load([first, other], "predictions")
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(f"{other} does not combine with {first}: ").removeprefix(f"{other}: ")

    assert refused(lambda s: s["features"].update(voice={"encoder": "x"})) == "features 'voice' were made another way"
    assert refused(lambda s: s.update(base={"name": "x", "files": {}})) == (
        "it was trained on other weights of the language model"
    )
    assert refused(lambda s: s.update(system="mosei")) == "it is a checkpoint of mosei"
    for file in ("tokenizer.model", "tokenizer.json"):
        assert refused(edit=lambda f, file=file: (f / file).write_bytes(b"x")) == f"it has another {file}"
    tensors = load_file(first / checkpoint.MODEL)
    name = next(iter(sorted(tensors)))
    less = {key: tensor for key, tensor in tensors.items() if key != name}
    says = refused(edit=lambda f: save_file(less, f / checkpoint.MODEL))
    assert says == f"{len(less)}/{len(tensors)} tensors match the model; 1 missing: {name}"
    says = refused(edit=lambda f: save_file(less | {name: torch.zeros(1, 2)}, f / checkpoint.MODEL))
    assert says.startswith(f"1 tensors of the wrong shape: {name} is (1, 2), not ")


def test_a_sibling_learns_nothing_from_the_first(checkpoints):
    first = single(checkpoints[0])
    before = first.projections["voice"].weight.clone()
    other = sibling(first)
    checkpoint.load_model(other, checkpoints[1])
    assert torch.equal(first.projections["voice"].weight, before)
    assert not torch.equal(other.projections["voice"].weight, before)
    assert not Ensemble([first, other]).eval().training
