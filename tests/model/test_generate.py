import itertools
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from common.config import UserError
from model import generate as decoding
from model.generate import State, generate, generate_together, nucleus, pick, score_labels
from model.llm import Llama, LlamaConfig

SHAPES = {"mha": 4, "gqa": 2}
PROMPTS = [[5, 9, 11], [7], [3, 3, 8, 1, 20, 31, 2], [12, 14]]
BEGUN = [[5, 9, 11, 30, 6, 4, 9, 1, *prompt] for prompt in PROMPTS]


def small(kv=2, vocab=37, **changes):
    """A random model whose choices are far apart, so that an equal answer is no accident of rounding."""
    torch.manual_seed(1)
    llm = Llama(LlamaConfig(vocab, 32, 48, 2, 4, kv, 8, **changes)).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return llm


def transformers_twin(llm, folder):
    transformers = pytest.importorskip("transformers")
    llm.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def greedy(llm, prompt, steps, eos=2):
    """Without a cache, one prompt at a time."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            token = int(llm(torch.tensor([ids]))[0, -1].argmax())
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kv", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("prompts", "computed"), [(PROMPTS, 13), (BEGUN, 8 + 13), ([[1, 2], [1, 2]], 4)])
def test_cached_logits_equal_uncached_in_a_ragged_batch(kv, prompts, computed):
    llm, read = small(kv), []
    llm.model.layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    with torch.inference_mode():
        state = State(llm, prompts, 5)
        assert read == [computed]  # a beginning that all share, where it is long, once
        rows = [list(prompt) for prompt in prompts]
        for step in range(6):
            wanted = torch.stack([llm(torch.tensor([row]))[0, -1] for row in rows])
            torch.testing.assert_close(state.logits, wanted, atol=1e-5, rtol=0)
            if step < 5:
                tokens = torch.randint(0, 37, (len(rows),))
                state.step(tokens)
                rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]


@pytest.mark.parametrize("kv", SHAPES.values(), ids=SHAPES)
def test_greedy_alone_and_in_a_ragged_batch_whose_rows_leave_early(kv):
    llm = small(kv)
    wanted = [greedy(llm, prompt, 30, eos=None) for prompt in PROMPTS]
    ends = [answer[n] for answer, n in zip(wanted, (2, 5, 9, 30), strict=True) if n < len(answer)]
    for eos in (ends[0], ends):  # an end token at different depths, and several of them
        stop = set(ends) if eos is ends else {eos}
        cut = [list(itertools.takewhile(lambda token, stop=stop: token not in stop, answer)) for answer in wanted]
        assert generate(llm, PROMPTS, 30, eos_id=eos) == cut
        assert [generate(llm, [prompt], 30, eos_id=eos)[0] for prompt in PROMPTS] == cut
    assert len({len(answer) for answer in cut}) > 1


def test_prompts_as_a_tensor_and_as_embeddings():
    llm = small()
    ids = torch.tensor([[5, 9, 11], [7, 8, 30]])
    wanted = [greedy(llm, row, 8) for row in ids.tolist()]
    assert generate(llm, ids, 8) == wanted
    with torch.no_grad():
        embedded = [llm.embed(torch.tensor(prompt)) for prompt in PROMPTS]
    assert generate(llm, embedded, 8) == generate(llm, PROMPTS, 8)


def test_end_token_comes_from_the_config():
    llm = small()
    answer = greedy(llm, [5, 9, 11], 12, eos=None)
    for ends in (answer[4], [answer[4], 36]):
        llm.config.eos_token_id = ends
        assert generate(llm, [[5, 9, 11]], 12) == [answer[: answer.index(answer[4])]]
    llm.config.eos_token_id = None
    assert generate(llm, [[5, 9, 11]], 12) == [answer]


def test_nothing_to_do_and_wrong_settings():
    llm = small()
    assert generate(llm, PROMPTS, 0) == [[], [], [], []]
    assert generate(llm, [], 5) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(llm, [[4], []], 5)
    for options, message in (
        ({"temperature": -1.0}, "temperature: -1.0 is negative"),
        ({"top_p": 0.0}, "top_p: 0.0 is not in (0, 1]"),
        ({"num_beams": 0}, "num_beams: 0 is not positive"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is not positive"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams 2 needs temperature 0, not 0.5"),
    ):
        with pytest.raises(UserError) as error:
            generate(llm, [[4]], 5, **options)
        assert str(error.value) == message


def test_nucleus_by_hand():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert torch.equal(nucleus(p, 0.7), torch.tensor([[0.0, 0.5, 0.0, 0.25], [0.97, 0.0, 0.0, 0.0]]))
    assert torch.equal(nucleus(p, 0.76), torch.tensor([[0.0, 0.5, 0.15, 0.25], [0.97, 0.0, 0.0, 0.0]]))
    assert torch.equal(nucleus(p, 1e-6) > 0, p == p.amax(-1, keepdim=True))


def test_nucleus_keeps_what_transformers_keeps():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 40)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept = transformers.TopPLogitsWarper(top_p)(None, logits) > -torch.inf
        assert torch.equal(nucleus(logits.softmax(-1), top_p) > 0, kept)


def test_samples_follow_temperature_and_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    p = (logits / 0.7).softmax(-1)  # masses .75, .18, .04, ...: a nucleus of .9 is the first two
    wanted = torch.tensor([p[0], p[1], 0, 0, 0]) / (p[0] + p[1])
    draws = pick(logits.expand(20000, 5), 0.7, 0.9, torch.Generator().manual_seed(0))
    got = draws.bincount(minlength=5) / 20000
    torch.testing.assert_close(got, wanted, atol=0.012, rtol=0)
    got = pick(logits.expand(20000, 5), 0.7, 1.0, torch.Generator().manual_seed(0)).bincount(minlength=5) / 20000
    torch.testing.assert_close(got, p, atol=0.012, rtol=0)


def test_sampling_repeats_with_its_generator():
    llm = small()

    def run(seed):
        draws = torch.Generator().manual_seed(seed)
        return generate(llm, PROMPTS, 12, temperature=1.0, top_p=0.95, generator=draws)

    assert run(3) == run(3) != run(4)
    assert generate(llm, PROMPTS, 12, temperature=1e-4) == generate(llm, PROMPTS, 12)


@pytest.mark.parametrize("embedded", [False, True])
def test_repetition_penalty_is_transformers(tmp_path, embedded):
    """Prompt tokens count when they are known, generated ones always."""
    llm = small()
    twin = transformers_twin(llm, tmp_path)
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            given = {"inputs_embeds": llm.embed(ids)} if embedded else {"input_ids": ids}
            theirs = twin.generate(
                **given, max_new_tokens=20, do_sample=False, repetition_penalty=1.6, pad_token_id=0, eos_token_id=2
            )[0].tolist()
            answer = theirs if embedded else theirs[len(prompt) :]
            ours = generate(llm, [llm.embed(ids)[0]] if embedded else [prompt], 20, repetition_penalty=1.6)[0]
            assert ours == list(itertools.takewhile(lambda token: token != 2, answer))
    assert generate(llm, PROMPTS, 20, repetition_penalty=1.6) != generate(llm, PROMPTS, 20)


@pytest.mark.parametrize(
    ("beams", "length_penalty", "repetition_penalty", "eos"),
    [(3, 1.0, 1.0, 2), (3, 0.0, 1.0, 2), (4, 1.3, 1.0, 2), (2, -1.0, 1.0, 2), (3, 1.0, 1.3, 2), (3, 1.0, 1.0, [2, 9])],
)
def test_beam_search_is_transformers(tmp_path, beams, length_penalty, repetition_penalty, eos):
    llm = small(vocab=13)  # few tokens, so that beams end early and often
    twin = transformers_twin(llm, tmp_path)
    prompts = [[t % 13 for t in prompt] for prompt in PROMPTS] + [[i, 12 - i] for i in range(13)]
    ends = [eos] if isinstance(eos, int) else eos
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            theirs = twin.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, num_beams=beams, do_sample=False,
                length_penalty=length_penalty, repetition_penalty=repetition_penalty, eos_token_id=eos, pad_token_id=0,
            )  # fmt: skip
        answer = theirs[0, len(prompt) :].tolist()
        wanted.append(list(itertools.takewhile(lambda token: token not in ends, answer)))
    options = {
        "num_beams": beams, "length_penalty": length_penalty, "repetition_penalty": repetition_penalty, "eos_id": eos
    }  # fmt: skip
    assert generate(llm, prompts, 10, **options) == wanted
    assert [generate(llm, [prompt], 10, **options)[0] for prompt in prompts[:4]] == wanted[:4]
    assert len({len(answer) for answer in wanted}) > 1  # some ended, some ran to the limit
    assert wanted != generate(llm, prompts, 10, eos_id=eos, repetition_penalty=repetition_penalty)


@pytest.mark.parametrize("kv", SHAPES.values(), ids=SHAPES)
def test_scores_are_the_sums_of_uncached_log_likelihoods(kv, monkeypatch):
    monkeypatch.setattr("model.generate.HEAD_ROWS", 12)  # several blocks of logits
    llm = small(kv)
    candidates = [[4], [6, 2], [6, 30, 2], [8, 8, 8, 8, 2], [6, 2]]
    wanted = torch.zeros(len(PROMPTS), len(candidates))
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            for j, candidate in enumerate(candidates):
                logp = llm(torch.tensor([prompt + candidate]))[0].log_softmax(-1)
                wanted[i, j] = sum(logp[len(prompt) - 1 + n, token] for n, token in enumerate(candidate))
        embedded = [llm.embed(torch.tensor(prompt)) for prompt in PROMPTS]
    scores = score_labels(llm, PROMPTS, candidates)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(score_labels(llm, embedded, candidates), wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(score_labels(llm, PROMPTS[:1], candidates), wanted[:1], atol=2e-5, rtol=0)
    torch.testing.assert_close(score_labels(llm, PROMPTS, [[4], [6]])[:, 0], wanted[:, 0], atol=2e-5, rtol=0)


def test_scores_behind_a_beginning_that_all_share():
    llm, candidates = small(), [[4], [6, 2], [6, 30, 2]]
    alone = torch.cat([score_labels(llm, [prompt], candidates) for prompt in BEGUN])
    torch.testing.assert_close(score_labels(llm, BEGUN, candidates), alone, atol=2e-5, rtol=0)
    same = [BEGUN[2]] * 3  # all but the last token
    torch.testing.assert_close(score_labels(llm, same, candidates), alone[[2, 2, 2]], atol=2e-5, rtol=0)


def test_scores_of_every_next_token_are_a_distribution():
    llm = small()
    scores = score_labels(llm, PROMPTS, [[token] for token in range(37)])
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(4))
    with pytest.raises(ValueError, match="candidate 1 is empty"):
        score_labels(llm, PROMPTS, [[3], []])


def test_a_published_model_tells_its_published_story():
    """stories260K of llama2.c: alone, and in a ragged batch of 8."""
    if "EMOTORCH_DATA" not in os.environ:
        pytest.skip("EMOTORCH_DATA is not set")
    data = Path(os.environ["EMOTORCH_DATA"], "llama")
    story = [int(i) for i in (data / "stories260K_greedy_ids.txt").read_text().split()]
    llm = Llama.from_pretrained(data / "stories260K")
    steps = len(story) - 1
    assert generate(llm, [story[:1]], steps) == [story[1:]]
    starts = (1, 40, 3, 120, 17, 1, 200, 64)
    answers = generate(llm, [story[:n] for n in starts], steps)
    for start, answer in zip(starts, answers, strict=True):
        assert answer[: len(story) - start] == story[start:]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_are_seen_as_they_come_and_a_row_may_end_early(temperature):
    llm, seen = small(), []

    def answers(follow=None, prompts=PROMPTS):
        draws = torch.Generator().manual_seed(3) if temperature else None
        return generate(llm, prompts, 9, temperature=temperature, generator=draws, eos_id=[], follow=follow)

    def look(row, tokens):
        seen.append((row, list(tokens)))
        return row != 1 or len(tokens) < 3

    whole = answers()
    assert answers(look)[1] == whole[1][:3]
    assert seen[:4] == [(row, whole[row][:1]) for row in range(4)]
    for row, answer in enumerate(whole if not temperature else [whole[1]]):  # fewer rows draw other tokens
        row, lengths = (1, range(1, 4)) if row == 1 or temperature else (row, range(1, 10))
        assert [tokens for which, tokens in seen if which == row] == [answer[:n] for n in lengths]
    seen.clear()
    assert [len(answer) for answer in answers(lambda row, tokens: seen.append(row))] == [1] * 4  # None: enough
    assert seen == [0, 1, 2, 3]


@pytest.fixture
def replayed(monkeypatch):
    """Programs of Fixed as a graph would run them, blind to whatever is no tensor; the slots of each that was made."""
    made = []

    def captured(step, device):
        fixed = step.__self__
        made.append(fixed.slots)

        def replay(slots=fixed.slots):
            end, fixed.cache.end, now, fixed.slots = fixed.cache.end, None, fixed.slots, slots
            try:
                return step()
            finally:
                fixed.cache.end, fixed.slots = end, now

        return replay

    monkeypatch.setattr(decoding, "captured", captured)
    monkeypatch.setattr(decoding, "BLOCK", 8)
    return made


@pytest.mark.parametrize("kv", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("prompts", [PROMPTS, BEGUN, [[5, 9, 11]]])
def test_steps_of_fixed_shape_give_the_same_logits(kv, prompts, replayed):
    llm = small(kv)
    with torch.inference_mode():
        plain, fixed = (State(llm, prompts, 18, graphs=graphs) for graphs in (False, True))
        for _ in range(18):
            tokens = torch.randint(0, 37, (len(prompts),))
            plain.step(tokens)
            fixed.step(tokens)
            torch.testing.assert_close(fixed.logits, plain.logits, atol=1e-5, rtol=0)
    first, slots = max(map(len, prompts)), plain.cache.slots
    assert replayed == [min(n, slots) for n in range((first // 8 + 1) * 8, slots + 8, 8)]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3}, {"temperature": 0.8}])
def test_generation_by_steps_of_fixed_shape(settings, replayed):
    llm = small()
    ends = [answer[n] for answer, n in zip(generate(llm, PROMPTS, 20, eos_id=[]), (2, 5, 9, 19), strict=True)]
    plain, fixed = (
        generate(llm, PROMPTS, 20, eos_id=ends, graphs=graphs, generator=torch.Generator().manual_seed(3), **settings)
        for graphs in (False, True)
    )
    assert fixed == plain
    assert any(plain)
    assert replayed


def test_a_program_is_made_anew_where_rows_leave(replayed):
    llm = small()
    wanted = generate(llm, PROMPTS, 20, eos_id=[])
    stops = [3, 20, 5, 20]
    found = generate(
        llm, PROMPTS, 20, eos_id=[], graphs=True, follow=lambda row, tokens: len(tokens) < stops[row]
    )  # fmt: skip
    assert found == [row[:n] for row, n in zip(wanted, stops, strict=True)]
    assert replayed == [8, 16, 16, 16, 24, 27]  # at slots 7, 8, where a row leaves at 10 and another at 12, 16 and 24


def test_models_together_by_steps_of_fixed_shape(replayed):
    models = [(small(2), PROMPTS), (small(4), PROMPTS)]
    plain, fixed = (generate_together(models, 12, graphs=graphs) for graphs in (False, True))
    assert fixed == plain
    assert len(replayed) == 2 * 3


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_compiled_steps_give_the_same_tokens(monkeypatch, settings):
    """Rows that leave at different times included; one program serves all numbers of slots."""
    made = []

    def traced(graph, inputs, **settings):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=traced))
    monkeypatch.setattr(decoding, "BLOCK", 8)
    torch._dynamo.reset()
    llm = small()
    ends = [answer[n] for answer, n in zip(generate(llm, PROMPTS, 20, eos_id=[]), (2, 5, 9, 19), strict=True)]
    plain, compiled = (
        generate(llm, PROMPTS, 20, eos_id=ends, compiled=compiled, **settings) for compiled in (False, True)
    )
    assert compiled == plain
    assert any(plain)
    assert 0 < len(made) <= 3  # the first shape, any shape, a single row
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_the_same_tokens(monkeypatch):
    monkeypatch.setattr(decoding, "BLOCK", 8)
    llm = small().cuda()
    for beams in (1, 3):
        plain, fixed = (generate(llm, PROMPTS, 20, num_beams=beams, graphs=graphs) for graphs in (False, True))
        assert fixed == plain
