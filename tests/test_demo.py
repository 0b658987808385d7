"""demo.py as a program: what stops it before it serves, a crowd of clients, its end, and the page in a browser."""

import contextlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import demo
import predict
from common import checkpoint
from data.manifest import Clip
from data.media import load_audio
from data.mock import make_mock
from tests.browser import CHROMIUM, Browser
from tests.serving import data_url, form, request, served
from tests.training import error
from tools import serve

ROOT = Path(demo.__file__).parent
README = (ROOT / "README.md").read_text()
CLIP, WORDS, WHY = "samplenew_00000004.mp4", "I am so happy with our garden.", "[reason] Why?"
TOKEN = {"X-API-Key": "sesame"}


@pytest.fixture(scope="module")
def predictor(trained):
    predictor = predict.load(trained.run)
    predictor.decode.max_new_tokens = 12
    return predictor


@contextlib.contextmanager
def program(*argv, **environment):
    """demo.py in a process of its own: its port, process and temporary folder."""
    command = [sys.executable, str(ROOT / "demo.py"), "--port", "0", *map(str, argv)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment, cwd=ROOT)
    try:
        for line in process.stdout:
            if found := re.search(r"API: http://127\.0\.0\.1:(\d+)/", line):
                yield SimpleNamespace(port=int(found[1]), process=process)
                break
        else:
            pytest.fail(f"demo.py ended with {process.wait()}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """The program with a token and little room, and its folder for temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    argv = ["--ckpt", trained.run, "--no-page", "--root", trained.data / "video", "--token", "sesame"]
    with program(*argv, "--max-upload-mb", 1, "--max-new-tokens", 12, TMPDIR=str(temporary)) as running:
        running.temporary = temporary
        yield running


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "--ckpt and --fast: one of them is needed (see --help)"),
        (["--ckpt", "a", "--fast"], "--ckpt and --fast: one of them is needed, not both"),
        (["--ckpt", "a", "--max-upload-mb", "0"], "--max-upload-mb: 0 is not positive"),
        (["--ckpt", "a", "--max-seconds", "-1"], "--max-seconds: -1 is not positive"),
        (["--ckpt", "a", "--queue", "0"], "--queue: 0 is not positive"),
        (["--ckpt", "a", "--batch-size", "0"], "--batch-size: 0 is not positive"),
        (["--ckpt", "a", "--root", "no/folder"], "--root no/folder: not a folder"),
        (["--ckpt", "a", "--token", " "], "--token: is empty"),
    ],
)
def test_mistakes(argv, line, capsys):
    assert error(demo, argv, capsys) == line


def test_without_gradio_the_page_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    said = error(demo, ["--ckpt", "a"], capsys)
    assert said == ("the page needs gradio: pip install -r requirements-extra.txt; --no-page serves the API without it")


def test_a_port_in_use_is_said_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(predict, "load", lambda *given: pytest.fail("it loads"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = error(demo, ["--ckpt", "a", "--no-page", "--port", port], capsys)
    assert said == f"--host 127.0.0.1 --port {port}: Address already in use"


def test_missing_encoder_weights_are_said_before_the_port_opens(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve.Server, "start", lambda *given: pytest.fail("it opens"))
    folder = checkpoint.resolve(trained.run, prefer="best")
    shutil.copytree(folder, tmp_path / "copy")
    state = json.loads((folder / "state.json").read_text())
    state["features"]["voice"] |= {"encoder": "hubert", "options": {"folder": "weights/none"}}
    (tmp_path / "copy" / "state.json").write_text(json.dumps(state))
    said = error(demo, ["--ckpt", tmp_path / "copy", "--no-page", "--port", 0], capsys)
    assert "weights/none" in said
    assert error(demo, ["--ckpt", tmp_path / "gone", "--no-page", "--port", 0], capsys)


def test_fast_trains_what_it_serves_once(tmp_path, monkeypatch):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(command) or SimpleNamespace(returncode=0))
    for _ in range(2):
        cfg = demo.Config(fast=True)
        demo.make_fast(cfg)
        assert (cfg.ckpt, cfg.root) == (["out/llm_fast"], "out/llm_fast/mock/video")
        (tmp_path / "out/llm_fast/checkpoints/best").mkdir(parents=True, exist_ok=True)
    assert [command[1:] for command in ran] == [[str(ROOT / "train_llm.py"), "--fast", "--no-test", "--out", demo.FAST]]


def test_the_examples_of_the_readme(trained, predictor, tmp_path):
    """The commands and the program as they stand there, at another port and with clips of another folder."""
    section = README.partition("\n## A page and an API\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^    (curl .*)$", section, re.MULTILINE)
    [python] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    expected = predictor(trained.data / "video" / CLIP, text=WORDS)["emotion"]
    with served(predictor, tmp_path, root=trained.data / "video") as running:

        def here(text):
            return text.replace("127.0.0.1:7889", f"127.0.0.1:{running.port}").replace(
                "out/llm_fast/mock", str(trained.data)
            )

        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(here(python), "README.md", "exec"), {})
        assert expected in [line.split()[0] for line in said.getvalue().splitlines()]  # beside the server's own log
        assert len(commands) == 2
        if shutil.which("curl") is None:
            pytest.skip("no curl here: apt-get install curl")
        for command in commands:
            done = subprocess.run(shlex.split(here(command)), capture_output=True, text=True, check=True, timeout=60)
            answer = json.loads(done.stdout)
            assert answer["label"] == answer.get("response", answer.get("data", [None])[0]) == expected


# ---- a crowd


class Crowd:
    """Requests of all kinds to a server, by many clients; what was not as documented is listed."""

    def __init__(self, port, root, predictor, silent, tmp_path):
        self.port, self.silent, self.wrong, self.lock = port, silent, [], threading.Lock()
        self.a, self.b, self.c = (root / f"samplenew_0000000{i}.mp4" for i in range(3))
        (tmp_path / "broken.mp4").write_bytes(b"no film" * 999)
        self.broken, self.large = tmp_path / "broken.mp4", b"x" * (2**20 + 2**17)
        self.kinds = [
            self.post(200, {"data": [self.a.name]}, predictor(self.a), "/api/predict"),
            self.post(200, form(file=self.b, text=WORDS), predictor(self.b, text=WORDS)),
            self.post(200, {"data": [data_url(self.c), "[emotion]"]}, predictor(self.c), "/api/predict"),
            self.post(200, {"video_path": self.a.name, "question": WHY}, predictor(self.a, question=WHY)),
            self.post(200, form(file=self.c, question=WHY), predictor(self.c, question=WHY)),
            self.post(200, form(file=silent), predictor(silent)),
            self.post(422, form(file=self.broken), "unusable_clip"),
            self.post(413, (self.large, form()[1]), "too_large"),
            self.post(403, {"video_path": "../../etc/passwd"}, "outside_root"),
            self.post(404, {"video_path": "gone.mp4"}, "not_found"),
            self.post(400, b"{", "bad_request"),
            self.post(401, {"video_path": self.a.name}, "unauthorized", token={}),
            self.abort(half=True),
            self.abort(half=False),
        ]

    def post(self, status, body, expected, path="/process_video", token=TOKEN):
        body, headers = body if isinstance(body, tuple) else (body, {})

        def ask():
            found, answer, _ = request(self.port, "POST", path, body, headers | token)
            if status != 200:
                return (found, answer["code"], list(answer)) == (status, expected, ["error", "code", "details"])
            same = found == 200 and answer["label"] == expected["emotion"]
            same &= answer["text"] == expected.get("answer", expected["emotion"])
            same &= answer["available_modalities"] == expected["available_modalities"]
            return same and answer.get("probabilities", {}) == pytest.approx(
                expected.get("probabilities", {}), abs=1.01e-4
            )  # fmt: skip

        return ask

    def abort(self, half):
        body = json.dumps({"video_path": self.a.name}).encode()
        head = f"POST /process_video HTTP/1.1\r\nHost: x\r\nX-API-Key: sesame\r\nContent-Length: {len(body)}\r\n\r\n"

        def ask():
            with socket.create_connection(("127.0.0.1", self.port), 20) as client:
                client.sendall(head.encode() + (body[:5] if half else body))
            return True

        return ask

    def send(self, count, clients):
        """So many requests, of each kind in turn."""
        numbers = iter(range(count))

        def client():
            while True:
                with self.lock:
                    number = next(numbers, None)
                if number is None:
                    return
                kind = number % len(self.kinds)
                try:
                    fine = self.kinds[kind]()
                except Exception as error:
                    fine = repr(error)
                if fine is not True:
                    self.wrong.append((kind, fine))

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)


def memory(pid):
    """Resident KiB of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_two_hundred_requests_of_sixteen_clients(server, trained, predictor, tmp_path):
    make_mock(tmp_path / "odd", 3, 0, seed=0, size=64, odd=3)
    [silent] = [path for path in (tmp_path / "odd" / "video").iterdir() if not sounds(path)]
    crowd = Crowd(server.port, trained.data / "video", predictor, silent, tmp_path)
    crowd.send(56, 16)
    before = memory(server.process.pid)
    crowd.send(200, 16)
    assert crowd.wrong == []
    assert memory(server.process.pid) <= 1.05 * before
    assert request(server.port, "GET", "/ready")[0] == 200
    assert server.process.poll() is None
    [folder] = server.temporary.iterdir()
    assert list(folder.iterdir()) == []


def sounds(path):
    try:
        return len(load_audio(path)) > 0
    except predict.MediaError:
        return False


def test_ctrl_c_with_requests_in_flight(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/process_video")
    for name, value in {"Content-Length": "99", **TOKEN}.items():
        connection.putheader(name, value)
    connection.endheaders(b"{")
    idle = socket.create_connection(("127.0.0.1", server.port), 20)
    time.sleep(0.3)
    began = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["code"]) == (503, "stopping")
    assert server.process.wait(60) == 0
    assert time.monotonic() - began < 60
    said = server.process.stdout.read().splitlines()
    assert "stopping: requests in flight get status 503" in said
    assert said[-1] == "stopped"
    assert list(server.temporary.iterdir()) == []
    idle.close()
    connection.close()


# ---- the page

GRADIO = find_spec("gradio") is not None
LAST = "[...document.querySelectorAll('#chat .bot.message, #chat .message.bot')].at(-1)"


@pytest.mark.skipif(not (GRADIO and CHROMIUM), reason="pip install -r requirements-extra.txt; apt-get install chromium")
def test_the_page_in_a_browser(trained, predictor, tmp_path):
    clip = trained.data / "video" / CLIP
    with program("--ckpt", trained.run, "--max-new-tokens", 12, TMPDIR=str(tmp_path)) as running:
        browser = Browser(tmp_path / "profile")
        try:
            drive(browser, running.port, predictor, clip, tmp_path)
        finally:
            browser.close()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0


def drive(browser, port, predictor, clip, tmp_path):
    """Uploads a clip, asks twice, and looks at the page at both widths."""
    browser.resize(1280, 1000)
    browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
    browser.until("document.querySelector('#clip input[type=file]') && document.readyState == 'complete'")
    for _ in range(5):  # until the page listens
        browser.choose("#clip input[type=file]", clip)
        with contextlib.suppress(AssertionError):
            browser.until("!document.querySelector('#clip input[type=file]')", 20)
            break
    browser.until("document.querySelector('#clip-seen svg[aria-label=waveform]') != null")
    assert browser.js("document.querySelectorAll('#clip-seen img').length") == 1  # the one frame of its visual tokens
    browser.js(
        "window.seen = []; new MutationObserver(() => { const text = " + LAST + "?.innerText.trim();"
        "if (text && window.seen.at(-1) != text) window.seen.push(text) })"
        ".observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true})"
    )
    browser.js("document.querySelector('#reason').click()")
    first = predictor(Clip("a", str(clip)), question="[reason]")["answer"]
    browser.until(f"{LAST}?.innerText.trim() == {json.dumps(first)}")
    grown = [text for text in browser.js("window.seen") if first.startswith(text)]
    assert len(grown) > 2, browser.js("window.seen")
    assert grown == sorted(grown, key=len)
    browser.js("document.querySelector('#emotion').click()")
    bars = browser.until(
        "document.querySelector('#bars').innerText.includes('%') && document.querySelector('#bars').innerText"
    )
    second = predictor(Clip("a", str(clip)), question="[emotion]", turns=[("[reason]", first)])
    shown = dict(re.findall(r"(\w+)\s+(\d+)%", bars))
    assert {name: int(value) for name, value in shown.items()} == {
        name: pytest.approx(100 * p, abs=0.51) for name, p in second["probabilities"].items()
    }
    browser.until(f"{LAST}?.innerText.trim() == {json.dumps(second['emotion'])}")
    assert "found: voice, patches" in browser.js("document.querySelector('#found').innerText")
    for width in (1280, 400):
        browser.resize(width, 1000)
        time.sleep(1)
        assert browser.js("document.documentElement.scrollWidth") == width
        browser.picture(tmp_path / f"{width}.png")
    browser.js("document.querySelector('#restart').click()")
    browser.until("!document.querySelectorAll('#chat .message').length")
