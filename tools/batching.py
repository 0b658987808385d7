"""One model for many: a bounded line of requests, of which those that ask the same are answered together."""

import itertools
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from common.config import UserError
from data.manifest import Clip
from data.media import MediaError


class Busy(Exception):
    """Every place in the line is taken."""


class Stopping(Exception):
    """The line was closed before there was an answer."""


class Cancelled(Exception):
    """Whoever asked is gone."""


class Failed(Exception):
    """The model failed for a reason that is no fault of the request; the log has it."""


class Job:
    """A question about a clip: the text of its answer as far as it is written, and in the end a result or an error."""

    def __init__(self, clip: Clip, question: str | None, turns: Sequence[tuple[str, str]]) -> None:
        self.clip, self.question, self.turns = clip, question, turns
        self._changed = threading.Condition()
        self._text = ""
        self._outcome: dict[str, Any] | Exception | None = None

    def say(self, text: str) -> bool:
        """Takes in what is written so far; whether anyone still waits for more."""
        with self._changed:
            self._text = text
            self._changed.notify_all()
            return not self.ended

    @property
    def ended(self) -> bool:
        return self._outcome is not None

    def end(self, outcome: dict[str, Any] | Exception) -> None:
        """Sets the result or the error; the first one stays."""
        with self._changed:
            self._outcome = self._outcome or outcome
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Waits so long for the end; whether it has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self.ended, seconds)

    def texts(self) -> Iterator[str]:
        """The answer as it grows, until the end; texts that come faster than they are taken are passed over."""
        seen = ""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.ended or self._text != seen)  # noqa: B023
                if self.ended:
                    return
                seen = self._text
            yield seen

    def cancel(self) -> None:
        """Gives up: the job leaves the line, or its answer ends where it is."""
        self.end(Cancelled())

    def result(self) -> dict[str, Any]:
        """What the predictor answered; raises the error in its place."""
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


@dataclass
class Read:
    """A job whose clip has been read, as the predictor's input."""

    job: Job
    sample: Any
    missing: dict[str, str]


class Line:
    """Requests that wait for a predictor, and the two threads that use it: one reads clips ahead, one answers.

    A batch holds up to `batch_size` requests that ask what the one that has waited longest asks. `places` counts all
    that have been let in: those that still send their clip, those that wait and those that are being answered.
    """

    def __init__(self, predictor: Any, places: int, batch_size: int) -> None:
        self.predictor, self.batch_size, self.free = predictor, batch_size, places
        self.closed = False
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._read: list[Read] = []
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()  # all that somebody may still wait for
        self._numbers = itertools.count(1)
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self._reader, self._answerer)]
        for thread in self.threads:
            thread.start()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line while the block runs; Busy if there is none, Stopping once it is closed."""
        with self._changed:
            if self.closed:
                raise Stopping
            if not self.free:
                raise Busy
            self.free -= 1
        try:
            yield
        finally:
            with self._changed:
                self.free += 1

    def submit(self, clip: Clip, question: str | None, turns: Sequence[tuple[str, str]] = ()) -> Job:
        """Puts a question at the end of the line, for one who has a place in it."""
        # every request is a clip of its own, whatever its file is called
        job = Job(replace(clip, id=f"clip {next(self._numbers)}"), question, turns)
        with self._changed:
            if self.closed:
                raise Stopping
            self._jobs.add(job)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def close(self, seconds: float = 10.0) -> None:
        """Ends every job with Stopping, and the threads, which get so long for what cannot be interrupted."""
        with self._changed:
            self.closed = True
            for job in self._jobs:
                job.end(Stopping())
            self._changed.notify_all()
        for thread in self.threads:
            thread.join(seconds)

    def _reader(self) -> None:
        """Reads the clips in the order of the line, no more than two batches ahead."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or (self._waiting and len(self._read) < 2 * self.batch_size))
                if self.closed:
                    return
                job = self._waiting.pop(0)
            with ended_by_errors([job]):
                if not job.ended:
                    read = Read(job, *self.predictor.sample(job.clip, job.question, turns=job.turns))
                    with self._changed:
                        self._read.append(read)
                        self._changed.notify_all()

    def _answerer(self) -> None:
        """Answers what has been read, those together that ask the same."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or self._read)
                if self.closed:
                    return
                self._read = [read for read in self._read if not read.job.ended]  # some have given up
                same = [read for read in self._read if read.job.question == self._read[0].job.question]
                batch = same[: self.batch_size]
                self._read = [read for read in self._read if read not in batch]
                self._changed.notify_all()
            self._answer(batch)

    def _answer(self, batch: list[Read]) -> None:
        if not batch:
            return
        jobs = {read.sample.id: read.job for read in batch}
        missing = {read.sample.id: read.missing for read in batch}
        # what fails together, for want of memory perhaps, is tried alone: a clip must not spoil its neighbours' answers
        with ended_by_errors(list(jobs.values()) if len(batch) == 1 else []) as errors:
            samples, question = [read.sample for read in batch], batch[0].job.question
            results = self.predictor.answer(samples, question, missing, lambda id, text: jobs[id].say(text))
            for result in results:
                jobs[result["id"]].end(MediaError(result["error"]) if "error" in result else result)
        if errors and len(batch) > 1:
            for read in batch:
                self._answer([read])


@contextmanager
def ended_by_errors(jobs: list[Job]) -> Iterator[list[Exception]]:
    """Ends the jobs with an error that is raised inside the block, and lists it; one of ours as Failed, logged."""
    errors: list[Exception] = []
    try:
        yield errors
    except (MediaError, UserError) as error:
        errors.append(error)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        errors.append(Failed(str(error)))
    for job in jobs if errors else []:
        job.end(errors[0])
