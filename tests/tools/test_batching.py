"""The line before a model: who is answered together, who is turned away, and what becomes of those who give up."""

import threading
import time

import pytest

from common.config import UserError
from data.manifest import Clip
from data.media import MediaError
from tools.batching import Busy, Cancelled, Failed, Line, Stopping


class Sample:
    def __init__(self, clip):
        self.id, self.word = clip.id, clip.text


class Model:
    """Answers with a clip's words, letter by letter; waits before each batch until it may go on."""

    def __init__(self, held=False):
        self.batches, self.goes_on = [], threading.Semaphore(0 if held else 10**6)
        self.fails = lambda words: False

    def sample(self, clip, question, turns=()):
        if clip.text == "blurred":
            raise MediaError(f"{clip.path}: blurred")
        if clip.text == "broken":
            raise ZeroDivisionError("secret")
        if question == "odd":
            raise UserError("no such question")
        return Sample(clip), {"voice": "none"}

    def answer(self, samples, question, missing, follow):
        words = [sample.word for sample in samples]
        self.batches.append((question, words))
        self.goes_on.acquire()
        if self.fails(words):
            raise RuntimeError("secret")
        results = []
        for sample in samples:
            told = ""
            for letter in sample.word:
                told += letter
                if not follow(sample.id, told):
                    break
            results.append({"id": sample.id, "answer": told, "missing": missing[sample.id]})
        return results


@pytest.fixture
def line():
    lines = []

    def make(model, places=99, batch_size=3):
        lines.append(Line(model, places, batch_size))
        return lines[-1]

    yield make
    for each in lines:
        each.predictor.goes_on.release(10**6)
        each.close()
        assert not any(thread.is_alive() for thread in each.threads)


def submit(line, *words, question=None):
    return [line.submit(Clip("x", text=word), question) for word in words]


def answers(jobs):
    assert all(job.wait(20) for job in jobs)
    return [job.result()["answer"] for job in jobs]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_those_that_ask_the_same_are_answered_together_in_their_order(line):
    model = Model(held=True)
    queue = line(model)
    first = submit(queue, "first")
    until(lambda: model.batches)  # the others come while the model is busy
    why, which = submit(queue, "a", "b", question="why"), submit(queue, "c", question="which")
    more = submit(queue, "d", "e", question="why")
    until(lambda: len(queue._read) == 5)
    model.goes_on.release(99)
    assert answers([*first, *why, *which, *more]) == ["first", "a", "b", "c", "d", "e"]
    assert model.batches == [(None, ["first"]), ("why", ["a", "b", "d"]), ("which", ["c"]), ("why", ["e"])]


def test_places_are_bounded_and_come_back(line):
    queue = line(Model(), places=2)
    with queue.place(), queue.place():
        with pytest.raises(Busy), queue.place():
            pass
    with pytest.raises(ValueError, match="oops"), queue.place():
        raise ValueError("oops")
    with queue.place(), queue.place():
        assert queue.free == 0
    assert queue.free == 2


def test_a_bad_clip_among_good_ones(line, capsys):
    model = Model(held=True)
    queue = line(model, batch_size=9)
    held = submit(queue, "held")
    until(lambda: model.batches)
    good, blurred, broken, fine = submit(queue, "good", "blurred", "broken", "fine")
    odd = submit(queue, "x", question="odd")[0]
    assert odd.wait(20)
    model.goes_on.release(99)
    assert answers([*held, good, fine]) == ["held", "good", "fine"]
    assert model.batches[1:] == [(None, ["good", "fine"])]
    for job, error in ((blurred, MediaError), (broken, Failed), (odd, UserError)):
        assert job.wait(20)
        with pytest.raises(error):
            job.result()
    assert "ZeroDivisionError: secret" in capsys.readouterr().err


def test_a_batch_that_fails_is_answered_one_by_one(line, capsys):
    model = Model(held=True)
    queue = line(model)
    held = submit(queue, "held")
    until(lambda: model.batches)
    model.fails = lambda words: len(words) > 2 or "b" in words
    a, b, c = submit(queue, "a", "b", "c")
    until(lambda: len(queue._read) == 3)
    model.goes_on.release(99)
    assert answers([*held, a, c]) == ["held", "a", "c"]
    assert b.wait(20)
    with pytest.raises(Failed):
        b.result()
    assert [words for _, words in model.batches] == [["held"], ["a", "b", "c"], ["a"], ["b"], ["c"]]


def test_a_job_that_is_given_up_leaves_the_line_or_ends_where_it_is(line):
    model = Model(held=True)
    queue = line(model)
    running = submit(queue, "running")[0]
    until(lambda: model.batches)
    gone, stays = submit(queue, "gone", "stays")
    until(lambda: len(queue._read) == 2)
    gone.cancel()
    running.cancel()
    model.goes_on.release(99)
    assert answers([stays]) == ["stays"]
    assert [words for _, words in model.batches] == [["running"], ["stays"]]
    for job in (running, gone):
        with pytest.raises(Cancelled):
            job.result()
    assert running._text == "r"  # the model was told after the first letter
    stays.cancel()
    assert answers([stays]) == ["stays"]


def test_an_answer_is_seen_growing(line):
    model = Model(held=True)
    queue = line(model)
    job = submit(queue, "abc")[0]
    texts = job.texts()
    model.goes_on.release()
    seen = list(texts)
    assert seen == sorted(seen)  # each begins with the one before it
    assert set(seen) <= {"a", "ab", "abc"}
    assert answers([job]) == ["abc"]


def test_closing_ends_all_that_wait(line):
    model = Model(held=True)
    queue = line(model)
    running = submit(queue, "running")[0]
    until(lambda: model.batches)
    waiting = submit(queue, "waiting")[0]
    closing = threading.Thread(target=queue.close)
    closing.start()
    for job in (running, waiting):
        assert job.wait(20)
        with pytest.raises(Stopping):
            job.result()
    model.goes_on.release(99)
    closing.join(20)
    assert len(model.batches) == 1
    with pytest.raises(Stopping):
        submit(queue, "late")
    with pytest.raises(Stopping), queue.place():
        pass
