import io
import os
import pickle
from pathlib import Path

import pytest
import sentencepiece

from common.config import UserError
from model.tokenizer import Tokenizer

CORPUS = [
    "the person in video says hello there", "[INST] please tell which emotion this is [/INST]", "the face looks happy",
    "why are you so sad today", "I am not angry at all", "what does the voice tell", "a smile and raised brows",
]  # fmt: skip
TEXTS = ["hello there", " hello", "hello ", "a  b", "", " ", "says: hi.  [emotion]", "kaffee élan 你好 😀\n\nx", "▁x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vocabulary of Llama's kind: no normalisation, all spaces kept, dummy prefix, byte fallback."""
    folder, model = tmp_path_factory.mktemp("vocabulary"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        user_defined_symbols=["$$"], minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(params=["trained here", "llama"])
def vocabulary(request, folder):
    """A folder with tokenizer.model: the one above, and Llama-2's where the shared data are."""
    if request.param == "trained here":
        return folder
    if "EMOTORCH_DATA" not in os.environ:
        pytest.skip("EMOTORCH_DATA is not set")
    return Path(os.environ["EMOTORCH_DATA"], "llama")


def test_every_segment_is_sentencepiece_with_its_dummy_prefix(vocabulary):
    tokenizer = Tokenizer(vocabulary)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer.encode(text) == pieces.encode(text)
    for left in TEXTS:
        for right in TEXTS:
            for special, i in (("<s>", 1), ("</s>", 2), ("<unk>", 0)):
                wanted = [*pieces.encode(left), i, *pieces.encode(right)]
                assert tokenizer.encode(left + special + right) == wanted
    assert tokenizer.encode("<s><s>[INST]</s>") == [1, 1, *pieces.encode("[INST]"), 2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.vocab_size == pieces.vocab_size()
    assert pieces.id_to_piece(tokenizer.pad_id) == "$$"


def test_decode_restores_text_without_specials(vocabulary):
    tokenizer = Tokenizer(vocabulary)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    ids = tokenizer.encode("hello there")
    assert tokenizer.decode([1, 1, *ids, 2, 0, tokenizer.vocab_size + 5]) == "hello there"
    assert tokenizer.decode([]) == ""


def test_published_prompt_ids():
    """As the slow Llama-2 tokenizer of transformers 4.30 gives them."""
    if "EMOTORCH_DATA" not in os.environ:
        pytest.skip("EMOTORCH_DATA is not set")
    tokenizer = Tokenizer(Path(os.environ["EMOTORCH_DATA"], "llama", "tokenizer.model"))
    assert tokenizer.vocab_size == 32000
    assert tokenizer.encode("[INST]")[0] == 518
    assert tokenizer.encode("[/INST]") == [518, 29914, 25580, 29962]
    assert tokenizer.encode("<s>[INST]") == [1, 518, 25580, 29962]
    assert tokenizer.encode("happy</s>") == [9796, 2]
    assert tokenizer.encode("<s> World") == [1, 29871, 2787]


def test_save_copies_the_model_and_workers_get_it_by_pickle(folder, tmp_path):
    tokenizer = Tokenizer(folder)
    tokenizer.save(tmp_path / "run")
    again = Tokenizer(tmp_path / "run" / "tokenizer.model")
    assert again.encode("the face looks <unk>happy") == tokenizer.encode("the face looks <unk>happy")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("hello</s>") == tokenizer.encode("hello</s>")


def test_a_vocabulary_without_a_pad_piece_pads_with_unk():
    if "EMOTORCH_DATA" not in os.environ:
        pytest.skip("EMOTORCH_DATA is not set")
    assert Tokenizer(Path(os.environ["EMOTORCH_DATA"], "llama", "stories260K")).pad_id == 0


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(UserError) as error:
        Tokenizer(tmp_path)
    assert str(error.value) == f"tokenizer: {tmp_path}/tokenizer.model not found"
    (tmp_path / "tokenizer.model").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"tokenizer.model is not a SentencePiece model"):
        Tokenizer(tmp_path)
