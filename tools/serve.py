"""A predictor over HTTP: clips by upload or by path, JSON answers, errors as status codes, perhaps a page beside it.

Only the standard library is used: demo.py --no-page needs nothing else. Each connection has a thread, which reads the
clip and waits; the model has threads of its own (tools/batching.py).
"""

import base64
import binascii
import email.parser
import http.client
import json
import mimetypes
import mmap
import re
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hmac import compare_digest
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from common.config import UserError
from data.manifest import Clip
from data.media import MediaError, length, probe
from tools.batching import Busy, Cancelled, Failed, Job, Line, Stopping
from tools.openapi import PREDICT, PROCESS, WORDS, description

OPEN = ("/health", "/ready", "/openapi.json")  # told without a token
CHUNK = 2**16  # bytes read at a time
PIXELS = 2**25  # of a frame: what is drawn out of a small file may be large
CONNECTIONS = 400  # at a time, each with a thread
BODY_SECONDS = 300.0  # in which a request must have arrived
# an upload that is too large is read to its end, so that the answer is seen, up to this many times the limit
PAST_LIMIT = 4
# headers that concern one connection, not what goes through it
HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
       "transfer-encoding", "upgrade", "content-length", "expect"}  # fmt: skip


class Problem(Exception):
    """An answer that is no success: its status, what is wrong in one line, a name for programs, and particulars."""

    def __init__(self, status: int, code: str, error: str, /, **details: Any) -> None:
        super().__init__(error)
        self.status, self.code, self.error, self.details = status, code, error, details

    def body(self) -> dict[str, Any]:
        return {"error": self.error, "code": self.code, "details": self.details}

    def headers(self) -> dict[str, str]:
        if self.status == HTTPStatus.UNAUTHORIZED:
            return {"WWW-Authenticate": 'Basic realm="emotorch: any name, the token as password"'}
        if self.status == HTTPStatus.METHOD_NOT_ALLOWED:
            return {"Allow": ", ".join(self.details["allowed"])}
        return {"Retry-After": "1"} if self.status == HTTPStatus.SERVICE_UNAVAILABLE else {}


def problem(error: Exception, shown: dict[str, str]) -> Problem:
    """What went wrong while a clip was answered, as the one who asked may know it; `shown`: path -> its name there."""

    def line() -> str:
        return named(" ".join(str(error).split()), shown)

    if isinstance(error, Problem):
        return error
    if isinstance(error, Busy):
        return Problem(503, "busy", "every place in the queue is taken: try again", retry_after=1)
    if isinstance(error, Stopping):
        return Problem(503, "stopping", "the server is being stopped")
    if isinstance(error, MediaError):
        return Problem(422, "unusable_clip", line())
    if isinstance(error, UserError):
        return Problem(400, "bad_request", line())
    if not isinstance(error, Failed):
        traceback.print_exception(error, file=sys.stderr)
    return Problem(500, "failed", "the server failed at this request; its log says why")


def named(text: str, shown: dict[str, str]) -> str:
    """A message with the paths of this machine left out."""
    for path, name in shown.items():
        text = text.replace(path, name)
    return text


def told(result: dict[str, Any], shown: dict[str, str]) -> dict[str, Any]:
    """A result as it is answered: text, label, confidence, probabilities, and what was found in the clip."""
    label = result["emotion"]
    answer = {"text": result.get("answer", label), "label": label}
    for name in ("confidence", "score"):
        if result.get(name) is not None:
            answer[name] = round(result[name], 4)
    if "strategy" in result:
        answer["strategy"] = result["strategy"]
    if "probabilities" in result:
        answer["probabilities"] = {name: round(p, 4) for name, p in result["probabilities"].items()}
    missing = {name: named(why, shown) for name, why in result["missing"].items()}
    return answer | {"available_modalities": result["available_modalities"], "missing": missing}


@dataclass
class Service:
    """The line before the model, and what may be asked of it."""

    line: Line
    folder: Path  # below it each request has a folder of its own
    root: Path | None  # of the clips that may be named by their path
    token: str | None
    max_bytes: int
    max_seconds: float

    def check(self, path: Path, size: bool = True) -> None:
        """Problem or MediaError for a clip that is too large, too long or no clip at all."""
        if size and path.stat().st_size > self.max_bytes:
            raise self.too_large(path.stat().st_size)
        about, seconds = probe(path), length(path)
        if not (about["has_video"] or about["has_audio"]):
            raise MediaError(f"{path}: neither pictures nor sound")
        if (about["width"] or 0) * (about["height"] or 0) > PIXELS:
            raise Problem(413, "too_large", f"a frame has {about['width']} x {about['height']} pixels", limit=PIXELS)
        if seconds > self.max_seconds:
            raise Problem(
                413, "too_long", f"the clip has {seconds:.1f} s, the limit is {self.max_seconds:g} s",
                limit=self.max_seconds, given=round(seconds, 1),
            )  # fmt: skip

    def too_large(self, given: int) -> Problem:
        mb = self.max_bytes / 2**20
        return Problem(413, "too_large", f"the upload is larger than {mb:g} MB", limit=self.max_bytes, given=given)

    def locate(self, given: str) -> Path:
        """The clip of a path on this machine, which must lie below the root, links followed."""
        if self.root is None:
            raise Problem(403, "outside_root", "clips by path are not served here (--root): upload the clip")
        gone = Problem(404, "not_found", f"{given[:200]}: there is no such clip")
        try:
            path = (self.root / given).resolve()
            if not path.is_relative_to(self.root.resolve()):
                raise Problem(403, "outside_root", f"{given[:200]}: not below the folder that is served")
            if not path.is_file():
                raise gone
        except ValueError:  # a zero byte
            raise Problem(400, "bad_request", "that is no path") from None
        except (OSError, RuntimeError):  # a name too long, links in a circle
            raise gone from None
        return path


@dataclass
class Asked:
    """What a request asks."""

    path: Path | None = None
    question: str | None = None
    text: str | None = None


def ask(service: Service, path: Path | None, question: str | None, text: str | None, turns: Any = ()) -> Job:
    """A job for a clip that has been looked at, by one who has a place in the line."""
    if path is not None:
        service.check(path)
    if question is not None and question.strip() in ("", "[emotion]"):
        question = None  # three ways to ask for the label, answered together
    return service.line.submit(Clip("clip", None if path is None else str(path), text), question, turns)


# ---- what a body holds


def read_json(body: bytes, process: bool) -> tuple[Any, Any, Any]:
    """Clip, question and words of a JSON body."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "bad_request", f"the body is not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise Problem(400, "bad_request", "the body is not a JSON object")
    if process:
        if "video_path" not in tree and "text" not in tree:
            raise Problem(400, "bad_request", "video_path is missing")
        return tree.get("video_path"), tree.get("question"), tree.get("text")
    data = tree.get("data")
    if not isinstance(data, list) or not 1 <= len(data) <= 3:
        raise Problem(
            400, "bad_request", "data is no list of a clip, a question and what is said, the last two optional"
        )
    clip, question, text = [*data, None, None][:3]
    return clip, question, text


def words(value: Any, name: str) -> str | None:
    """A text of a request."""
    if value is not None and not isinstance(value, str):
        raise Problem(400, "bad_request", f"{name} is not a text")
    if value is not None and len(value) > WORDS:
        raise Problem(400, "bad_request", f"{name} has more than {WORDS:,} characters", limit=WORDS)
    return value


def suffix(name: str | None, kind: str = "") -> str:
    """The ending of a file's name, by which decoders are chosen, or one for its media type."""
    found = re.search(r"\.[A-Za-z0-9]{1,5}$", name or "")
    return found[0].lower() if found else mimetypes.guess_extension(kind) or ""


def from_data_url(url: str, name: str | None) -> tuple[bytes, str]:
    """The bytes of a data URL, and the ending of a file for them."""
    head, mark, data = url.partition(";base64,")
    try:
        if not mark:
            raise ValueError
        return base64.b64decode(data, validate=True), suffix(name, head.removeprefix("data:").partition(";")[0])
    except (ValueError, binascii.Error):
        raise Problem(400, "bad_request", "the clip is not a data URL in base64") from None


def parts(body: mmap.mmap, boundary: str) -> Iterator[tuple[str, str | None, int, int]]:
    """(name, file name, first byte, end) of the parts of a multipart body."""
    mark, at = b"--" + boundary.encode("latin-1"), 0
    while True:
        start = body.find(mark, at) + len(mark)
        if start < len(mark):
            break
        if body[start : start + 2] == b"--":
            return
        head, end = body.find(b"\r\n\r\n", start, start + 8192), body.find(b"\r\n" + mark, start)
        if not start <= head <= end:
            break
        fields = email.parser.BytesHeaderParser().parsebytes(body[start + 2 : head + 4])
        name = fields.get_param("name", header="content-disposition")
        yield str(name), fields.get_filename(), head + 4, end
        at = end
    raise Problem(400, "bad_request", "the multipart body is damaged")


# ---- connections


class Handler(BaseHTTPRequestHandler):
    """One connection: its requests, one after the other."""

    server: "Server"
    protocol_version, server_version, sys_version = "HTTP/1.1", "emotorch", ""
    timeout = 60  # seconds without a byte
    disable_nagle_algorithm = True
    left = 0  # bytes of the request's body that have not been read
    answered = waits = False  # whether an answer has begun; whether the client waits for leave to send its body

    def setup(self) -> None:
        super().setup()
        self.server.opened(self.connection)

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()
        self.server.ended(self.connection)

    def route(self) -> None:
        """Answers one request, whatever happens."""
        self.answered, self.began, shown = False, time.perf_counter(), {}
        try:
            self.left = self.declared()
            self.dispatch(urlsplit(self.path).path, shown)
        except (ConnectionError, TimeoutError, Cancelled):  # nobody is there to be answered
            self.close_connection = True
        except Exception as error:
            found = problem(error, shown)
            if self.answered:  # too late for another status
                self.close_connection = True
            else:
                with suppress(OSError):
                    self.reply(found.status, found.body(), found.headers())
        self.waits = False

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = route

    def dispatch(self, path: str, shown: dict[str, str]) -> None:
        """Sends a request to what answers it."""
        path = path.rstrip("/") or "/"
        if path in OPEN:
            self.allow("GET", "HEAD")
            return self.reply(*self.server.about(path))
        self.authorize()
        if path in (PREDICT, PROCESS):
            self.allow("POST")
            return self.predict(path, shown)
        if self.server.page is None:
            raise Problem(404, "not_found", f"{path}: nothing is here; /openapi.json says what there is")
        self.forward(self.server.page)

    def allow(self, *methods: str) -> None:
        if self.command not in methods:
            line = f"{self.command}: only {' and '.join(methods)} here"
            raise Problem(405, "method_not_allowed", line, allowed=methods)

    def authorize(self) -> None:
        """Problem without the token: as a bearer, as X-API-Key, or as the password that a browser asks for."""
        token = self.server.service.token
        if token is None:
            return
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        given = value.encode("latin-1")  # the bytes that were sent
        if kind.lower() == "basic":
            with suppress(ValueError):
                given = base64.b64decode(value).partition(b":")[2]
        elif not kind:
            given = self.headers.get("X-API-Key", "").encode("latin-1")
        if not compare_digest(given, token.encode()):
            raise Problem(401, "unauthorized", "the token is missing or wrong")

    # ---- reading

    def declared(self) -> int:
        """How many bytes the request says its body has."""
        given = self.headers.get_all("Content-Length") or ["0"]
        if (
            "Transfer-Encoding" in self.headers
            or len(set(given)) > 1
            or not re.fullmatch(r"\d{1,15}", given[0].strip())
        ):
            self.close_connection = True
            raise Problem(411, "length_required", "the body needs one Content-Length")
        return int(given[0])

    def handle_expect_100(self) -> bool:
        self.waits = True  # leave is given when the body is wanted
        return True

    def chunks(self) -> Iterator[bytes]:
        """The body; its end may not come before its declared length, nor too late."""
        if self.waits:
            self.waits = False
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        deadline = time.monotonic() + BODY_SECONDS
        while self.left:
            data = self.rfile.read1(min(self.left, CHUNK))
            if self.server.service.line.closed:
                raise Stopping
            if not data:
                raise ConnectionAbortedError
            if time.monotonic() > deadline:
                raise Problem(408, "too_slow", f"the body took more than {BODY_SECONDS:g} s")
            self.left -= len(data)
            yield data

    def asked(self, folder: Path, process: bool, shown: dict[str, str]) -> Asked:
        """What the request asks; its clip, if it brings one, in the folder."""
        service, form = self.server.service, self.headers.get_content_type() == "multipart/form-data"
        # base64 takes four bytes for three; questions and headers of parts come on top
        if self.left > service.max_bytes * (1 if form else 4 / 3) + 2**16:
            raise service.too_large(self.left)
        if not self.left:
            raise Problem(400, "bad_request", "the request has no body")
        body = folder / "body"
        with body.open("wb") as file:
            for data in self.chunks():
                file.write(data)
        found = self.from_form(body, folder) if form else self.from_json(body, folder, process)
        body.unlink()
        return self.checked(*found, shown)

    def from_json(self, body: Path, folder: Path, process: bool) -> tuple[Any, Any, Any]:
        """Clip, question and words of a JSON body; an upload in it as a file in the folder."""
        with self.server.parsing:  # one body at a time is in memory
            clip, question, text = read_json(body.read_bytes(), process)
            name = None
            if isinstance(clip, dict):  # as gradio's clients send files
                name = clip.get("orig_name") or clip.get("name")
                clip = clip.get("data") or clip.get("path") or clip.get("name")
            if isinstance(clip, str) and clip.startswith("data:"):
                data, ending = from_data_url(clip, name if isinstance(name, str) else None)
                clip = folder / f"clip{ending}"
                clip.write_bytes(data)
        return clip, question, text

    def checked(self, clip: Any, question: Any, text: Any, shown: dict[str, str]) -> Asked:
        """A request that can be answered; `clip` is a file of ours or what was sent as one's path."""
        asked = Asked(question=words(question, "question"), text=words(text, "text"))
        if isinstance(clip, Path):
            asked.path = clip
            shown[str(clip)] = "the clip"
        elif isinstance(clip, str) and clip:
            asked.path = self.server.service.locate(clip)
            shown[str(asked.path)] = clip
        elif clip not in (None, ""):
            raise Problem(400, "bad_request", "the clip is neither a path nor an upload")
        elif not (asked.text or "").strip():
            raise Problem(400, "bad_request", "there is neither a clip nor words")
        return asked

    def from_form(self, body: Path, folder: Path) -> tuple[Any, Any, Any]:
        """Clip, question and words of a form with a file."""
        boundary = self.headers.get_param("boundary")
        if not isinstance(boundary, str) or not 1 <= len(boundary) <= 200:
            raise Problem(400, "bad_request", "the form has no boundary")
        found: dict[str, Any] = {}
        with body.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            for name, filename, start, end in parts(held, boundary):
                if name in found:
                    raise Problem(400, "bad_request", f"{name} comes twice in the form")
                if name == "file" and filename is not None:
                    found[name] = folder / f"clip{suffix(filename)}"
                    with found[name].open("wb") as copy:
                        for at in range(start, end, 2**20):
                            copy.write(held[at : min(at + 2**20, end)])
                elif name in ("question", "text", "video_path") and end - start <= 4 * WORDS:
                    found[name] = held[start:end].decode("utf-8", "replace")
                else:
                    raise Problem(400, "bad_request", f"{name}: a form has file or video_path, question and text")
        return found.get("file", found.get("video_path")), found.get("question"), found.get("text")

    # ---- answering

    def predict(self, path: str, shown: dict[str, str]) -> None:
        """The answer to a question about a clip."""
        service = self.server.service
        with service.line.place():
            with TemporaryDirectory(dir=service.folder) as folder:
                asked = self.asked(Path(folder), path == PROCESS, shown)
                job = ask(service, asked.path, asked.question, asked.text)
                shown[job.clip.id] = "the clip"
                while not job.wait(0.1):
                    if self.gone():
                        job.cancel()
                answer = told(job.result(), shown)
        seconds = round(time.perf_counter() - self.began, 3)
        first = {"response": answer["text"]} if path == PROCESS else {"data": [answer["text"]]}
        self.reply(200, first | answer | {"duration": seconds})

    def gone(self) -> bool:
        """Whether the client has hung up."""
        try:
            ready, _, _ = select.select([self.connection], [], [], 0)
            return bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def reply(self, status: int, tree: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """Sends JSON; what is left of the body is not read as another request."""
        body = json.dumps(tree, ensure_ascii=False).encode()
        if self.left:
            self.close_connection = True
        self.answered = True
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")
        self.log_request(status)
        self.linger()

    def linger(self) -> None:
        """Reads the rest of a body that was not wanted: a connection closed before it takes the answer with it."""
        if not self.left or self.waits:
            return
        deadline, most = time.monotonic() + 10, PAST_LIMIT * self.server.service.max_bytes
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.left and most > 0 and time.monotonic() < deadline:
                data = self.rfile.read1(CHUNK)
                if not data:
                    return
                self.left, most = self.left - len(data), most - len(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server finds wrong with a request, in our form."""
        self.close_connection, self.began = True, time.perf_counter()
        self.command = self.command or ""
        found = Problem(code, "bad_request", message or HTTPStatus(code).phrase)
        with suppress(OSError):
            self.reply(code, found.body())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing of what http.server would say, of timeouts and the like."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """One line a question; health checks and the page's many files would bury them."""
        if urlsplit(getattr(self, "path", "")).path.rstrip("/") in (PREDICT, PROCESS):
            print(
                f"{self.command} {urlsplit(self.path).path} {code} {time.perf_counter() - self.began:.2f} s", flush=True
            )

    # ---- the page

    def forward(self, page: Path) -> None:
        """Hands the request to the page's own server, and its answer back as it comes."""
        if self.left > self.server.service.max_bytes + 2**16:
            raise self.server.service.too_large(self.left)
        upstream = Upstream(page)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP:
                    upstream.putheader(name, value)
            if self.left or self.command == "POST":
                upstream.putheader("Content-Length", str(self.left))
            upstream.endheaders()
            for data in self.chunks():
                upstream.send(data)
            answer = upstream.getresponse()
            length, bare = answer.headers["Content-Length"], self.command == "HEAD" or answer.status in (204, 304)
            chunked = length is None and not bare
            self.answered = True
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            if length is not None:
                self.send_header("Content-Length", length)
            elif chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while not bare and (data := answer.read1(CHUNK)):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
        finally:
            upstream.close()


class Upstream(http.client.HTTPConnection):
    """A connection to the page's server over a socket in a folder, which nobody else can open."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self.path))


class Server(ThreadingHTTPServer):
    """Bound to its address at once, so that a port in use is known before a model is loaded; open from start() on."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, host: str, port: int) -> None:
        self.service: Service
        self.page: Path | None = None  # the socket of the page's server
        self.parsing = threading.Lock()
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler, bind_and_activate=False)
        with taken(host, port):
            self.server_bind()

    def server_bind(self) -> None:
        """Without HTTPServer's question for the host's name, which may take a resolver seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = str(self.server_address[0]), self.socket.getsockname()[1]

    def start(self, service: Service) -> None:
        """Opens the port and answers from a thread of its own."""
        self.service = service
        with taken(self.server_name, self.server_port):
            self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="server", daemon=True).start()

    def stop(self) -> None:
        """Closes the port, answers what is in flight with 503, and waits for that."""
        self.shutdown()
        self.server_close()
        self.service.line.close()
        with self._changed:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)  # no more requests; answers still go out
            self._changed.wait_for(lambda: not self._open, 10)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Gives a connection its thread, unless there are too many."""
        if len(self._open) < CONNECTIONS:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def opened(self, connection: socket.socket) -> None:
        with self._changed:
            self._open.add(connection)

    def ended(self, connection: socket.socket) -> None:
        with self._changed:
            self._open.discard(connection)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def about(self, path: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, body and headers of what is told to anyone."""
        line = self.service.line
        if path == "/health":
            return 200, {"status": "ok"}, {}
        if path == "/ready":
            ready = not line.closed and line.free > 0
            return (200, {"status": "ready"}, {}) if ready else (503, {"status": "busy"}, {"Retry-After": "1"})
        service = self.service
        return 200, description(service.max_bytes, service.max_seconds, service.token is not None), {}


@contextmanager
def taken(host: str, port: int) -> Iterator[None]:
    """A UserError where an address cannot be had."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None
    except OverflowError:
        raise UserError(f"--port {port}: not a port") from None
