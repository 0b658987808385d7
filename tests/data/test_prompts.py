import math
import random
import re

import pytest

from common.config import UserError
from data.prompts import (
    DFEW7,
    EMOTIONS6,
    EMOTIONS9,
    LABEL_IDS,
    LAYOUTS,
    QUESTIONS,
    Slot,
    Special,
    choose,
    emotion_question,
    extract_label,
    label_questions,
    named,
    next_turn,
    parse_tagged,
    phrase,
    pick_question,
    process_answer,
    segments,
    spoken,
    target,
)

UTTERANCE = ["mae", "videomae", "hubert"]
# The instruction of the released code, as one string with its two placeholders.
PUBLISHED = (
    "[INST] <video><VideoHere></video> <feature><FeatureHere></feature> The person in video says: Oh my!.  "
    "[emotion] What is it?  [/INST]"
)


def test_labels():
    assert LABEL_IDS["neutral"] == 0
    assert LABEL_IDS["doubt"] == 8
    assert set(LABEL_IDS) == set(EMOTIONS9)
    assert {label for label, index in LABEL_IDS.items() if index < 6} == set(EMOTIONS6)
    assert len(set(DFEW7)) == 7


def test_published_question():
    question = (
        "Please determine which emotion label in the video represents: "
        "happy, sad, neutral, angry, worried, surprise, fear, contempt, doubt."
    )
    assert emotion_question(EMOTIONS9) == question
    assert QUESTIONS["emotion"] == (question,)
    assert pick_question("emotion") == question


def test_train_layout_is_the_published_one():
    parts = segments("emotion", "What is it?", "Oh my!", UTTERANCE)
    assert parts == [
        "<s>",
        "[INST] <video>",
        Slot("image"),
        "</video> <feature>",
        Slot("mae"),
        Slot("videomae"),
        Slot("hubert"),
        Slot("cls"),
        "</feature> The person in video says: Oh my!.  [emotion] What is it?  [/INST]",
    ]
    text = "".join({"image": "<VideoHere>", "cls": "<FeatureHere>"}.get(p.name, "") if isinstance(p, Slot) else p
                   for p in parts)  # fmt: skip
    assert text == "<s>" + PUBLISHED


def test_original_eval_layout_is_the_published_one():
    parts = segments("emotion", "What is it?", "Oh my!", UTTERANCE, layout="original_eval")
    names = [part.name for part in parts if isinstance(part, Slot)]
    assert names == ["image", "mae", "videomae", "hubert", "cls"]
    assert [isinstance(part, Slot) for part in parts] == [False] * 3 + [True] * 5 + [False]  # the pack is in one place
    *before, after = (part for part in parts if isinstance(part, str))
    assert f"{''.join(before)}<VideoHere>{after}" == "<s><s>" + PUBLISHED  # <FeatureHere> stays a text


def test_question_first_layout_ends_with_the_embeddings():
    given = {"image": False, "cls": False, "layout": "question_first"}
    assert segments("emotion", "What is it?", None, ["voice"], chat_template=False, **given) == [
        "<s>",
        "[emotion] What is it? <video></video> <feature>",
        Slot("voice"),
    ]
    parts = segments("emotion", "What is it?", "Hi", ["voice"], **given)
    assert parts[1:] == [
        "[INST] The person in video says: Hi. [emotion] What is it? <video></video> <feature>",
        Slot("voice"),
        " [/INST]",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Oh my!", "The person in video says: Oh my! "),
        ("I am  here. ", "The person in video says: I am here. "),
        ("really", "The person in video says: really. "),
        (None, ""),
    ],
)
def test_clean_layout_has_single_spaces_and_full_stops(text, said):
    parts = segments("emotion", "What is it?", text, UTTERANCE, layout="clean")
    assert parts[:-1] == segments("emotion", "What is it?", text, UTTERANCE)[:-1]  # the embeddings stay in their place
    assert parts[-1] == f"</feature> {said}[emotion] What is it? [/INST]"
    assert "  " not in parts[-1]
    bare = segments("emotion", "What is it?", text, UTTERANCE, layout="clean", chat_template=False)
    assert bare[-1] == f"</feature> {said}[emotion] What is it?"


def test_targets_follow_the_layout():
    text = "She is OK. (Almost) Happy!"
    assert target(text, "clean") == text
    assert {target(text, layout) for layout in LAYOUTS if layout != "clean"} == {process_answer(text)}


def test_a_conversation_goes_on_as_llama_2_has_it():
    for chat_template, asked in ((True, "[INST] [reason] Why? [/INST]"), (False, "[reason] Why?")):
        turn = next_turn("He smiles.", "reason", "Why?", chat_template)
        assert turn == ["He smiles. ", "</s>", "<s>", asked]
        assert [isinstance(part, Special) for part in turn] == [False, True, True, False]


def test_absent_parts():
    assert segments("reason", "Why?", None, ["hubert"], image=False, cls=False) == [
        "<s>",
        "[INST] <video></video> <feature>",
        Slot("hubert"),
        "</feature>  [reason] Why?  [/INST]",
    ]
    assert segments("reason", "Why?", "Hi", [], image=False, cls=False, chat_template=False) == [
        "<s>",
        "<video></video> <feature></feature> The person in video says: Hi.  [reason] Why? ",
    ]


def reference_answer(text):
    """blip_caption, character by character."""
    text = "".join(" " if char in '.!"()*#:;~' else char for char in text.lower())
    while "  " in text:
        text = text.replace("  ", " ")
    return " ".join(text.strip().split(" ")[:200])


@pytest.mark.parametrize(
    "text",
    [
        "The MAN (smiles): \"it's well-known, isn't it?\" #joy ~ 50*2;  End!",
        "  Sad.  ",
        "word. " * 250,
        "",
        "...",
        "Ünïcode É",
    ],
)
def test_process_answer(text):
    assert process_answer(text) == reference_answer(text)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("said", ["Oh my!", "Well. [laughs] I see.", "No. No, no.\nNever...", None])
def test_what_is_said_is_found_again(layout, said):
    parts = segments("emotion", "What is it?", said, UTTERANCE, layout=layout)
    told = " ".join(said.split()).removesuffix(".") if said and layout == "clean" else said
    assert spoken("".join(part if isinstance(part, str) else f"<{part.name}>" for part in parts)) == told


def test_process_answer_by_hand():
    assert process_answer("She's OK... (well, almost)!\nRight?") == "she's ok well, almost right?"
    assert process_answer("one two three", max_words=2) == "one two"


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("happy", "happy"),
        (" **Happy**. ", "happy"),
        ("The person is SAD!", "sad"),
        ("not happy but sad", "sad"),
        ("He is sad, not happy.", "sad"),
        ("She isn't happy, she is worried", "worried"),
        ("She isn\u2019t really happy.", None),
        ("neither happy nor sad; neutral", "neutral"),
        ("not happy or sad but angry", "angry"),
        ("not only angry", "angry"),
        ("no doubt she's angry", "angry"),
        ("There is no sign of fear, just surprise.", "surprise"),
        ("neutral rather than sad", "neutral"),
        ("first neutral, then happy", "happy"),
        ("it reflects happiness", "happy"),
        ("a feeling of anger", "angry"),
        ("sadness", "sad"),
        ("he looks Surprised", "surprise"),
        ("neutrality", "neutral"),
        ("unhappy", None),
        ("he is saddled", None),
        ("disgust", None),
        ("", None),
        ("...", None),
    ],
)
def test_robust_label(answer, label):
    assert extract_label(answer, EMOTIONS9) == label


def test_robust_label_speaks_the_caller_s_words():
    assert extract_label("she is happy", ("joy", "anger")) == "joy"
    assert extract_label("He looks afraid.", ("fearful", "surprised")) == "fearful"
    assert extract_label("surprise", ("fearful", "surprised")) == "surprised"
    assert extract_label("anger", ("angry", "anger")) == "anger"  # a label's own word comes first
    assert extract_label("ANGRY", ("Angry", "anger")) == "Angry"
    assert extract_label("I am very happy", ("happy", "very happy")) == "very happy"
    assert extract_label("low mood", ("low", "low_mood")) == "low_mood"


@pytest.mark.parametrize("forms", [*EMOTIONS9, *DFEW7])
def test_every_label_names_itself(forms):
    assert extract_label(f"The emotion is {forms.title()}.", [forms]) == forms


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("it is happy", "happy"),
        ("happy.", None),
        ("Happy", None),
        ("happy person", None),
        ("", None),
        ("a\nsad", "sad"),
    ],
)
def test_original_label_is_the_last_word(answer, label):
    assert extract_label(answer, EMOTIONS6, how="original") == label


def test_choose_follows_the_weights():
    rng = random.Random(0)
    draws = [choose({"reason": 0.3, "reason_v2": 0.7, "emotion": 0}, rng) for _ in range(4000)]
    assert abs(draws.count("reason") / 4000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert "emotion" not in draws
    for weights in ({"a": 0.0}, {"a": -1.0, "b": 2.0}, {}):
        with pytest.raises(UserError, match=f"^{re.escape(f'weights {weights}: none may be negative')}"):
            choose(weights, rng)


def test_questions_are_drawn_from_the_pool():
    rng = random.Random(1)
    assert {pick_question("reason", rng) for _ in range(200)} == set(QUESTIONS["reason"])
    assert {name: len(pool) for name, pool in QUESTIONS.items()} == {
        "emotion": 1, "emotion6": 5, "emotion_guide": 3, "reason": 5, "reason_v2": 5, "reason_guide": 3, "caption": 6,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"^task 'reasons' has no questions \(tasks: emotion, emotion6, "):
        pick_question("reasons")


def test_the_emotion_question_offers_what_it_is_told_to():
    assert pick_question("emotion", labels=["calm", "sad"]) == emotion_question(["calm", "sad"])
    for offered, labels in (("nine", EMOTIONS9), ("six", EMOTIONS6)):
        assert pick_question("emotion", labels=["calm", "sad"], offered=offered) == emotion_question(labels)
    assert pick_question("emotion", offered="guide") == "What is the emotion expressed in this video?"
    rng = random.Random(0)
    for task in ("emotion", "reason"):
        pool = {pick_question(task, rng, offered="guide") for _ in range(100)}
        assert pool == set(QUESTIONS[f"{task}_guide"])
    assert pick_question("emotion", rng, offered="none", paraphrase=True) == ""
    assert pick_question("reason", offered="none") == QUESTIONS["reason"][0]
    assert pick_question("reason_v2", offered="guide") == QUESTIONS["reason_guide"][0]
    assert {pick_question("emotion", rng) for _ in range(50)} == {emotion_question(EMOTIONS9)}  # not unless asked for


def test_paraphrases_of_any_labels():
    rng = random.Random(0)
    drawn = {pick_question("emotion", rng, EMOTIONS6, paraphrase=True) for _ in range(200)}
    assert drawn == set(QUESTIONS["emotion6"][1:])
    published = "Identify the displayed emotion in the video: is it happy, sad, neutral, angry, worried, or surprise?"
    assert published in drawn
    for labels in (["calm"], ["calm", "sad"], list(DFEW7)):
        first, *others = label_questions(labels)
        assert first == emotion_question(labels)
        assert all(label in question for question in others for label in labels)
    assert label_questions(["calm", "sad"])[1] == "Identify the displayed emotion in the video: is it calm, or sad?"
    assert label_questions(["calm"])[1] == "Identify the displayed emotion in the video: is it calm?"


def test_tagged_questions():
    assert parse_tagged("[reason_v2] Why is\nthat? [x]") == ("reason_v2", "Why is\nthat? [x]")
    assert parse_tagged(" [emotion]Which?") == ("emotion", "Which?")
    assert parse_tagged("Why? [emotion]") == ("reason", "Why? [emotion]")


def test_every_phrase_that_a_text_names():
    phrases = {phrase("looking forward to"): "hope", phrase("Mad"): "angry", phrase("sad"): "sad", (): "nothing"}
    assert named("Mad, sad, and looking forward to it; not mad.", phrases) == ["angry", "sad", "hope"]
    assert named("looking forward", phrases) == []
    assert named("", phrases) == []
