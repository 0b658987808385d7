"""Answers to turns, field by field, against whole sequences that are scored one at a time."""

import pytest
import torch

from common import dist
from data.support import FIELDS, parse_answer
from evals import support
from evals.emotion import DecodeConfig
from model import mllm
from model.mllm import MllmConfig
from tests.data.test_turns import data, turn
from tests.qwen import make_qwen

HERE = dist.Ranks()
EMOTIONS = ["joy", "sadness", "neutral"]
STRATEGIES = ["open question", "others", "approval"]
PROMPT = {"emotions": EMOTIONS, "strategies": STRATEGIES, "modalities": ["text", "history"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    make_qwen(folder)
    cfg = MllmConfig(llm=str(folder), features={}, visual=None, lora_r=2, max_len=900)
    model, tokenizer = mllm.build(cfg, torch.float32, torch.device("cpu"))
    turns = [turn(n, 0, exchanges=n % 4, client=f"I feel {'so ' * n}tired") for n in range(7)]
    turns.append(turn(9, 1, client_emotion=None))
    return model.eval(), tokenizer, data(tokenizer, turns, compressed=False, prompt=PROMPT)


def likelihood(model, ids, start):
    """Log probability of ids[start:] after ids[:start], in one pass without cache or packing."""
    with torch.no_grad():
        logits = model.llm(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_scored_fields_follow_each_other(world):
    model, tokenizer, turns = world
    records = support.ask(model, tokenizer, turns, DecodeConfig(max_new_tokens=4), HERE, batch_size=3)
    assert [record["id"] for record in records] == [each.id for each in turns.turns]
    for i, record in enumerate(records):
        prompt = [token for piece in turns.sample(i).pieces for token in piece]
        text = ""
        asked = list(FIELDS)[:3] if turns.turns[i].client_emotion else list(FIELDS)[1:3]
        assert list(record["probabilities"]) == asked
        for name in asked:
            labels = STRATEGIES if name == "strategy" else EMOTIONS
            lines = [f"{text}{FIELDS[name]}: {label}" for label in labels]
            scores = [
                likelihood(model, prompt + tokenizer.encode(f"{line} \n", specials=()), len(prompt)) for line in lines
            ]
            expected = torch.tensor(scores, dtype=torch.float64).softmax(0)
            found = torch.tensor(list(record["probabilities"][name].values()), dtype=torch.float64)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            text = lines[int(expected.argmax())] + " \n"
        fields = parse_answer(record["answer"])
        assert record["answer"].startswith(text + "Therapist's response:")
        assert all(
            fields[name] == max(record["probabilities"][name], key=record["probabilities"][name].get) for name in asked
        )
        assert record["target"] == {
            "client_emotion": turns.turns[i].client_emotion, "therapist_emotion": "neutral",
            "strategy": "open question", "response": turns.turns[i].therapist,
        }  # fmt: skip


def test_a_balanced_field_is_what_the_next_one_follows(world):
    model, tokenizer, turns = world
    counts = {"client_emotion": {"sadness": 1000, "neutral": 500, "joy": 1}}
    cfg = DecodeConfig(balance=2.0)
    [plain] = support.ask(model, tokenizer, turns, DecodeConfig(), HERE, limit=1, respond=False, counts=counts)
    [made] = support.ask(model, tokenizer, turns, cfg, HERE, limit=1, respond=False, counts=counts)
    before = plain["probabilities"]["client_emotion"]
    p = {label: value / counts["client_emotion"][label] ** 2 for label, value in before.items()}
    expected = {label: value / sum(p.values()) for label, value in p.items()}
    assert made["probabilities"]["client_emotion"] == pytest.approx(expected, rel=1e-4)
    first = max(expected, key=lambda label: expected[label])
    assert first != max(before, key=lambda label: before[label])
    lines = [f"Client's emotion: {first} \nTherapist's emotion: {label} \n" for label in EMOTIONS]
    prompt = [token for piece in turns.sample(0).pieces for token in piece]
    ids = [prompt + tokenizer.encode(line, specials=()) for line in lines]
    scores = torch.tensor([likelihood(model, row, len(prompt)) for row in ids], dtype=torch.float64).softmax(0)
    found = torch.tensor([*made["probabilities"]["therapist_emotion"].values()], dtype=torch.float64)  # never counted
    torch.testing.assert_close(found, scores, atol=1e-5, rtol=1e-4)


def test_the_last_field_ends_the_answer(world):
    model, tokenizer, turns = world
    alone = data(tokenizer, turns.turns[:2], compressed=False, prompt=PROMPT | {"fields": ["strategy"]})
    for i, record in enumerate(support.ask(model, tokenizer, alone, DecodeConfig(), HERE)):
        prompt = [token for piece in alone.sample(i).pieces for token in piece]
        lines = [tokenizer.encode(f"Therapist's strategy: {label}", specials=()) for label in STRATEGIES]
        scores = [likelihood(model, [*prompt, *line, tokenizer.eos_id], len(prompt)) for line in lines]
        found = torch.tensor(list(record["probabilities"]["strategy"].values()), dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(scores).double().softmax(0), atol=1e-5, rtol=1e-4)
        assert record["answer"] == f"Therapist's strategy: {STRATEGIES[int(found.argmax())]}"


def test_a_response_is_what_greedy_decoding_writes_after_the_fields(world):
    model, tokenizer, turns = world
    [record] = support.ask(model, tokenizer, turns, DecodeConfig(max_new_tokens=6), HERE, limit=1)
    head, _, said = record["answer"].partition("Therapist's response:")
    ids = [token for piece in turns.sample(0).pieces for token in piece]
    ids += tokenizer.encode(head + "Therapist's response:", specials=())
    new = []
    for _ in range(6):
        with torch.no_grad():
            new.append(int(model.llm(torch.tensor([ids + new]))[0, -1].argmax()))
        if new[-1] == tokenizer.eos_id:
            break
    assert said.strip() == tokenizer.decode([token for token in new if token != tokenizer.eos_id]).strip()
    [unspoken] = support.ask(model, tokenizer, turns, DecodeConfig(), HERE, limit=1, respond=False)
    assert unspoken["answer"] == head.removesuffix(" \n")


def test_batches_and_processes_do_not_matter(world, ranks):
    model, tokenizer, turns = world
    cfg = DecodeConfig(max_new_tokens=5)
    one = support.ask(model, tokenizer, turns, cfg, HERE, batch_size=1)
    many = support.ask(model, tokenizer, turns, cfg, HERE, batch_size=8, workers=3)
    for a, b in zip(one, many, strict=True):
        assert a["answer"] == b["answer"]
        for name, found in a["probabilities"].items():
            assert found == pytest.approx(b["probabilities"][name], abs=1e-5)
    halves = ranks(2, asked_on, world, cfg)
    assert halves[0] == halves[1]
    assert [record["answer"] for record in halves[0]] == [record["answer"] for record in one]


def asked_on(world, cfg):
    here = dist.setup("cpu")
    return support.ask(*world, cfg, here, batch_size=2)


def test_a_whole_answer_is_generated(world):
    model, tokenizer, turns = world
    records = support.ask(model, tokenizer, turns, DecodeConfig(decode="generate", max_new_tokens=5), HERE, limit=2)
    assert all("probabilities" not in record for record in records)
    scores = support.evaluate(records, EMOTIONS, STRATEGIES)
    assert scores["unparsable"] == 2  # five tokens of a model that was never trained are no answer
    assert scores["fields"]["strategy"]["accuracy"] == 0
