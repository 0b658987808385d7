"""An OpenAI-compatible chat server asked by many threads, and a file that remembers every reply."""

import contextlib
import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from common.config import UserError

Turns = tuple[str, ...]  # user, assistant, user, ...
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further try
RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
REFUSED = {400, 413, 422}  # this request: another may be fine
GIVE_UP = 20  # requests lost in a row: the server is gone, the others are not even tried


@dataclass
class Reply:
    """What came back: a text, or None and the problem."""

    text: str | None
    tokens_in: int = 0
    tokens_out: int = 0
    problem: str = ""


@dataclass
class Usage:
    """What was asked and what it costs; prices are per million tokens."""

    price_in: float = 0.0
    price_out: float = 0.0
    requests: int = 0
    failed: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, reply: Reply) -> None:
        self.requests += 1
        self.failed += reply.text is None
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out

    @property
    def cost(self) -> float:
        return (self.tokens_in * self.price_in + self.tokens_out * self.price_out) / 1e6

    def line(self) -> str:
        """The cost line."""
        cost = f"; cost {self.cost:.4f}" if self.price_in or self.price_out else ""
        failed = f" ({self.failed} without a reply)" if self.failed else ""
        return (
            f"judge: {self.requests} questions asked{failed}, {self.cached} answered from the cache; "
            f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out{cost}"
        )


class Cache:
    """Replies by question in an append-only JSONL file: what was asked once is not asked again, after a kill either."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        try:
            content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--judge-cache {path}: {error.strerror}") from None
        self.torn = bool(content) and not content.endswith("\n")
        for line in content.split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a killed run
                entry = json.loads(line)
                self.replies[entry["key"]] = Reply(entry["reply"], entry["tokens_in"], entry["tokens_out"])

    @staticmethod
    def key(identity: str, turns: Turns) -> str:
        """sha256 of who is asked and of all that is said."""
        return hashlib.sha256(json.dumps([identity, *turns]).encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self.replies

    def __getitem__(self, key: str) -> Reply:
        return self.replies[key]

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply, on disk before this returns."""
        self.replies[key] = reply
        entry = {"key": key, "reply": reply.text, "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
        try:
            with open(self.path, "ab", buffering=0) as file:  # one write: runs that share the file do not mix lines
                file.write(("\n" * self.torn + json.dumps(entry) + "\n").encode())
        except OSError as error:
            raise UserError(f"--judge-cache {self.path}: {error.strerror}") from None
        self.torn = False


class Again(Exception):
    """Worth another try, after `wait` seconds where the server says so; `gone`: the server may be down."""

    def __init__(self, problem: str, wait: float = 0.0, gone: bool = True) -> None:
        super().__init__(problem)
        self.wait, self.gone = wait, gone


class Refused(Exception):
    """Not worth another try."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """None: the key goes to the address that the user gave, and to no other."""


class Api:
    """A chat model behind a URL; the key comes from $OPENAI_API_KEY and is written nowhere."""

    def __init__(self, url: str, model: str, workers: int, timeout: float, seed: int) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc or parts.query:
            raise UserError(f"--judge-url {url!r}: needs http(s)://host/path; a key goes into $OPENAI_API_KEY")
        if workers < 1 or timeout <= 0:
            raise UserError("--judge-workers and --judge-timeout must be above 0")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.workers, self.timeout, self.seed = model, workers, timeout, seed
        self.name = f"api: {model} at {parts.netloc}"
        self.identity = json.dumps([self.url, model, {"temperature": 0, "seed": seed}])
        self.opener = urllib.request.build_opener(_NoRedirect)
        self.stop = threading.Event()
        self.lost = 0  # requests in a row that got no reply, however often they were tried

    def complete(self, conversations: Sequence[Turns]) -> Iterator[tuple[int, Reply]]:
        """(place, reply) of each conversation as it comes; UserError when the server wants none of them."""
        self.stop.clear()
        self.lost = 0
        pool = ThreadPoolExecutor(self.workers)
        try:
            places = {pool.submit(self._try, turns): i for i, turns in enumerate(conversations)}
            for future in as_completed(places):
                yield places[future], future.result()
        finally:  # also when the run is interrupted: threads that wait for their next try end at once
            self.stop.set()
            pool.shutdown(cancel_futures=True)

    def _try(self, turns: Turns) -> Reply:
        """One request, tried again after growing waits; only once while others were lost just before."""
        if self.stop.is_set() or self.lost >= GIVE_UP:
            return Reply(None, problem="not asked: the server had stopped to reply")
        problem: Again | None = None
        for least in (0, *WAITS):
            if problem and (self.lost or self.stop.wait(max(problem.wait, least))):
                break
            try:
                reply = self._post(turns)
            except Again as error:
                problem = error
            except Refused as error:
                return Reply(None, problem=str(error))
            else:
                self.lost = 0
                return reply
        assert problem is not None
        self.lost += problem.gone
        return Reply(None, problem=str(problem))

    def _post(self, turns: Turns) -> Reply:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        body = {"model": self.model, "messages": messages, "temperature": 0, "seed": self.seed}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                found = json.loads(response.read())
            text = found["choices"][0]["message"]["content"]
            usage = found.get("usage") or {}
            asked, told = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
            return Reply(str(text or ""), asked, told)
        except urllib.error.HTTPError as error:
            self._refuse(error)
        except (OSError, http.client.HTTPException) as error:  # unreachable, timed out, cut off
            raise Again(f"no reply ({getattr(error, 'reason', None) or error or type(error).__name__})") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Again("the reply is no chat completion") from None

    def _refuse(self, error: urllib.error.HTTPError) -> NoReturn:
        """Raises what an HTTP status means for this request or for all of them."""
        said = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            said = " ".join(error.read(2000).decode(errors="replace").split())[:200]
        problem = f"HTTP {error.code} {error.reason}: {said}"
        if error.code in RETRY:
            after = error.headers.get("Retry-After") or ""
            raise Again(problem, min(float(after), 120.0) if after.isdecimal() else 0.0, gone=error.code >= 500)
        if error.code in REFUSED:
            raise Refused(problem)
        raise UserError(f"--judge-url {self.url}: {problem}")
