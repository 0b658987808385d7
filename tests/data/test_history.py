import re

import pytest

from data.history import history_ids, history_text

TURNS = [
    ("Client", "anger", "You never listen."),
    ("Therapist", "neutral", "Tell me what happened."),
    ("Client", "sadness", "She left."),
]
WORDS: dict[str, int] = {}


def encode(text, specials=("<MEM>",)):
    """One id a word, a mark or a punctuation sign; an id is its word's number."""
    assert list(specials) == ["<MEM>"]
    return [WORDS.setdefault(word, len(WORDS)) for word in re.findall(r"<MEM>|\w+|[^\w\s]", text)]


def decode(ids):
    return " ".join(list(WORDS)[i] for i in ids)


def test_the_published_form():
    text = history_text(TURNS)
    assert text == (
        "Client(anger) You never listen. <MEM> Therapist(neutral) Tell me what happened. <MEM> "
        "Client(sadness) She left. <MEM> "
    )
    assert history_text([]) == ""
    assert history_text([("Client", "joy", "I said <MEM> once.")]) == "Client(joy) I said  once. <MEM> "


@pytest.mark.parametrize(
    ("most", "kept"), [(512, 3), (27, 3), (26, 2), (18, 2), (17, 1), (8, 1), (7, 0), (0, 0)]
)  # 9, 10 and 8 tokens
def test_the_oldest_utterances_go_first_and_whole(most, kept):
    assert [len(encode(history_text([turn]))) for turn in TURNS] == [9, 10, 8]
    assert history_ids(history_text(TURNS), encode, most) == encode(history_text(TURNS[3 - kept :]))


def test_what_is_kept_is_encoded_as_it_would_be_alone():
    for most, kept in ((512, TURNS), (18, TURNS[1:])):
        seen = []
        history_ids(history_text(TURNS), lambda text, seen=seen, **how: seen.append(text) or encode(text, **how), most)
        assert seen[-1] == history_text(kept).rstrip()


def test_what_no_mark_sums_up_is_left_out():
    assert history_ids("", encode) == []
    assert history_ids("Client(anger) You never listen.", encode) == []
    assert decode(history_ids("Client(joy) Yes. <MEM>Therapist(neutral) And", encode)) == "Client ( joy ) Yes . <MEM>"


def test_long_histories_are_encoded_a_few_times_only():
    calls = []
    text = history_text(TURNS * 200)
    ids = history_ids(text, lambda text, **how: calls.append(text) or encode(text, **how), 512)
    assert 512 - 10 < len(ids) <= 512
    assert len(calls) <= 12
