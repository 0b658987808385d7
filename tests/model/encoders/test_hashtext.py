"""Hashed n-grams: which ones there are, that they are the same everywhere, and that they tell texts apart."""

import zlib

import torch

from model import encoders


def bucket(gram):
    return zlib.crc32(gram.encode()) % 2**16


def test_words_pairs_and_character_runs():
    ids = encoders.load("hashtext").encode("Don't  GO!", "ids")
    grams = ["don't", "go", "!", "don't go", "go !"]
    grams += ["#<do", "#don", "#on'", "#n't", "#'t>", "#<don", "#don'", "#on't", "#n't>", "#<don'", "#don't", "#on't>"]
    grams += ["#<go", "#go>", "#<go>", "#<!>"]
    assert ids.tolist() == [bucket(gram) for gram in grams]
    assert ids.dtype == torch.int32


def test_ids_do_not_depend_on_process_or_version():
    # the published check value of CRC-32 is cbf43926 for this text
    assert encoders.load("hashtext").encode("123456789")[0] == 0x3926


def test_same_alone_and_in_a_batch():
    encoder = encoders.load("hashtext")
    texts = ["I am so happy today", "", "...", "no"]
    rows = encoder(texts)
    assert [row.tolist() for row in rows] == [encoder.encode(text).tolist() for text in texts]
    assert [len(row) > 0 for row in rows] == [True, False, False, True]
    assert all(0 <= id < encoder.out_dim("ids") for row in rows for id in row.tolist())


def test_chinese_is_read_by_character():
    ids = encoders.load("hashtext").encode("我很开心")
    assert ids[:7].tolist() == [bucket(gram) for gram in ("我", "很", "开", "心", "我 很", "很 开", "开 心")]


def test_info_declares_ids():
    info = encoders.load("hashtext").info("ids")
    assert (info["kind"], info["dim"], info["dtype"]) == ("ids", 65536, "int32")


def test_counts_are_the_ids_folded():
    encoder = encoders.load("hashtext")
    text = "So glad, so so glad!"
    counts = torch.zeros(1024)
    for id in encoder.encode(text, "ids").tolist():
        counts[id % 1024] += 1
    assert torch.equal(encoder.encode(text, "counts"), counts.log1p())
    assert counts.max() >= 3
    assert encoder.encode("", "counts").shape == (encoder.out_dim("counts"),) == (1024,)
    assert encoder.info("counts") | {"kind": "dense", "dtype": "float32", "dim": 1024} == encoder.info("counts")
    assert encoder.info("ids")["kind"] == "ids"
