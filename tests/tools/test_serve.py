"""The HTTP API: predict.py's answers whatever way a clip is sent, and the documented status for everything else."""

import http.client
import json
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import soundfile

import predict
from common.config import UserError
from tests.serving import data_url, form, request, served
from tools import serve

GUIDE, PROCESS = "/api/predict", "/process_video"
WORDS = "I am so happy with our garden."


@pytest.fixture(scope="module")
def predictor(trained):
    return predict.load(trained.run)


@pytest.fixture(scope="module")
def clips(trained):
    return sorted((trained.data / "video").glob("samplenew_*.mp4"))


@pytest.fixture(scope="module")
def world(predictor, clips, tmp_path_factory):
    """A server over a trained model, and its folder of clips."""
    root = tmp_path_factory.mktemp("root")
    for clip in clips[:3]:
        shutil.copy(clip, root / clip.name)
    (root / "broken.mp4").write_bytes(b"no film" * 99)
    (root / "cut.mp4").write_bytes(clips[0].read_bytes()[:9000])
    (root / "empty.wav").touch()
    (root / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.3,\n{clips[0]}\n#EXT-X-ENDLIST\n")
    soundfile.write(root / "voice.wav", 0.1 * np.random.default_rng(0).normal(size=16000).astype(np.float32), 16000)
    soundfile.write(root / "long.wav", np.zeros(21 * 8000, np.float32), 8000)
    (root / "folder.mp4").mkdir()
    (root / "away.mp4").symlink_to(clips[0])
    (root / "near.mp4").symlink_to(root / clips[0].name)
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    folder = tmp_path_factory.mktemp("requests")
    with served(predictor, folder, root=root) as server:
        server.root, server.folder = root, folder
        yield server
    assert list(folder.iterdir()) == []


def close_to(found, expected):
    """Whether an answer over HTTP is a result of predict.py, its numbers rounded."""
    assert found["label"] == expected["emotion"]
    assert found["text"] == expected.get("answer", expected["emotion"])
    assert found["available_modalities"] == expected["available_modalities"]
    rounded = {name: round(p, 4) for name, p in expected.get("probabilities", {}).items()}
    assert found.get("probabilities", {}) == rounded
    assert found.get("confidence") == (max(rounded.values()) if rounded else None)


def test_every_way_to_send_a_clip_gives_the_answer_of_predict(world, predictor, clips, monkeypatch):
    monkeypatch.setattr(predictor.decode, "max_new_tokens", 6)
    clip, why = clips[0], "[reason] Why?"
    result = predictor(clip, text=WORDS)
    for sent in (
        clip.name, str(world.root / clip.name), "near.mp4", data_url(clip),
        {"name": "a.mp4", "data": data_url(clip, "application/octet-stream")},
        {"path": clip.name, "meta": {"_type": "gradio.FileData"}}, {"name": clip.name, "data": None},
    ):  # fmt: skip
        status, found, _ = request(world.port, "POST", GUIDE, {"data": [sent, None, WORDS]})
        assert (status, found["data"]) == (200, [found["text"]])
        close_to(found, result)
        assert 0 < found["duration"] < 60
    result, asked = predictor(clip, question=why, text=WORDS), {"question": why, "text": WORDS}
    answers = [request(world.port, "POST", PROCESS, {"video_path": clip.name, **asked})]
    answers += [request(world.port, "POST", PROCESS, *form(file=clip, **asked))]
    answers += [request(world.port, "POST", f"{GUIDE}/", *form(video_path=clip.name, **asked))]
    for status, found, _ in answers:
        assert status == 200
        assert found.get("response", found["text"]) == found["text"]
        close_to(found, result)


def test_answers_in_a_batch_are_those_of_clips_alone(predictor, clips, tmp_path, monkeypatch):
    """To the last digit that is shown, whatever clips share the batch."""
    monkeypatch.setattr(predictor.decode, "max_new_tokens", 8)
    sizes, whole, goes_on = [], predictor.answer, threading.Event()

    def answer(samples, *given):
        sizes.append(len(samples))
        goes_on.wait(20)  # until the others have been read
        return whole(samples, *given)

    monkeypatch.setattr(predictor, "answer", answer)
    asked = [(clip, question) for question in (None, "[reason] Why?") for clip in clips[:5]]
    with served(predictor, tmp_path, root=clips[0].parent) as server:
        jobs = [serve.ask(server.server.service, clip, question, WORDS) for clip, question in asked]
        until(lambda: sizes and len(server.line._read) + sizes[0] == len(jobs))
        goes_on.set()
        assert all(job.wait(60) for job in jobs)
    assert sum(sizes) == 10
    assert sizes[-1] == 5
    for job, (clip, question) in zip(jobs, asked, strict=True):
        close_to(serve.told(job.result(), {}), predictor(clip, question=question, text=WORDS))


def test_what_a_clip_lacks_is_named_and_nothing_of_the_machine(world, predictor, tmp_path):
    status, found, _ = request(world.port, "POST", PROCESS, {"video_path": "voice.wav"})
    assert status == 200
    assert found["missing"]["patches"] == "voice.wav: no video stream"
    close_to(found, predictor(world.root / "voice.wav"))
    status, found, _ = request(world.port, "POST", PROCESS, *form(file=world.root / "voice.wav"))
    assert found["missing"]["patches"] == "the clip: no video stream"
    status, found, _ = request(world.port, "POST", GUIDE, {"data": [None, None, WORDS]})  # words alone
    assert status == 200
    close_to(found, predictor(text=WORDS))


def line_of(answer, status, code):
    """The one line of an error, whose body has the documented form."""
    assert answer[0] == status
    assert list(answer[1]) == ["error", "code", "details"]
    assert answer[1]["code"] == code
    assert "Traceback" not in json.dumps(answer[1])
    assert "\n" not in answer[1]["error"]
    return answer[1]["error"]


@pytest.mark.parametrize(
    ("video", "status", "code", "line"),
    [
        ("gone.mp4", 404, "not_found", "gone.mp4: there is no such clip"),
        ("folder.mp4", 404, "not_found", "folder.mp4: there is no such clip"),
        ("../x.mp4", 403, "outside_root", "../x.mp4: not below the folder that is served"),
        ("/etc/passwd", 403, "outside_root", "/etc/passwd: not below the folder that is served"),
        ("away.mp4", 403, "outside_root", "away.mp4: not below the folder that is served"),
        ("broken.mp4", 422, "unusable_clip", "broken.mp4: Invalid data found when processing input"),
        ("cut.mp4", 422, "unusable_clip", None),
        ("empty.wav", 422, "unusable_clip", "empty.wav: empty file"),
        ("list.m3u8", 422, "unusable_clip", None),
        ("long.wav", 413, "too_long", "the clip has 21.0 s, the limit is 20 s"),
        ("a\0b.mp4", 400, "bad_request", "that is no path"),
        ("x" * 300, 404, "not_found", None),
        ("loop.mp4", 404, "not_found", "loop.mp4: there is no such clip"),
        ("data:video/mp4;base64,!!!", 400, "bad_request", "the clip is not a data URL in base64"),
        ("data:video/mp4,abc", 400, "bad_request", "the clip is not a data URL in base64"),
        ("data:video/mp4;base64,bm8gZmlsbQ==", 422, "unusable_clip", None),
        ("data:video/mp4;base64,", 422, "unusable_clip", "the clip: empty file"),
        (["a.mp4"], 400, "bad_request", "the clip is neither a path nor an upload"),
        ({"url": "http://127.0.0.1/a.mp4"}, 400, "bad_request", "there is neither a clip nor words"),
        (7, 400, "bad_request", "the clip is neither a path nor an upload"),
        ("", 400, "bad_request", "there is neither a clip nor words"),
    ],
)
def test_clips_that_cannot_be_had(world, video, status, code, line):
    for path, body in ((PROCESS, {"video_path": video}), (GUIDE, {"data": [video]})):
        found = line_of(request(world.port, "POST", path, body), status, code)
        assert line in (None, found)
        assert str(world.folder) not in found


@pytest.mark.parametrize(
    ("path", "body", "line"),
    [
        (GUIDE, b"", "the request has no body"),
        (GUIDE, b"{", None),
        (GUIDE, b"\xff\xfe{", None),
        (GUIDE, b"[" * 100_000, None),
        (GUIDE, [1], "the body is not a JSON object"),
        (GUIDE, {}, "data is no list of a clip, a question and what is said, the last two optional"),
        (GUIDE, {"data": []}, "data is no list of a clip, a question and what is said, the last two optional"),
        (GUIDE, {"data": ["a", 1]}, "question is not a text"),
        (GUIDE, {"data": ["a", "?" * 4001]}, "question has more than 4,000 characters"),
        (GUIDE, {"data": ["a", None, "?" * 4001]}, "text has more than 4,000 characters"),
        (PROCESS, {"question": "Why?"}, "video_path is missing"),
        (PROCESS, {"video_path": None, "text": " "}, "there is neither a clip nor words"),
    ],
)
def test_bodies_that_say_nothing(world, path, body, line):
    assert line in (None, line_of(request(world.port, "POST", path, body), 400, "bad_request"))


FORM = form(text="a")[0]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"--x1", b"--x1\r\n", b"--x1\r\n\r\n", b"--x1--", b"--x2--\r\n", b"--x1\r\nno\r\n\r\nend",
        form(other="a")[0], form(file="not a file")[0], FORM.removesuffix(b"--\r\n"),
        FORM.removesuffix(b"--x1--\r\n") + FORM,
    ],
)  # fmt: skip
def test_forms_that_are_damaged(world, body):
    line_of(request(world.port, "POST", PROCESS, body, form()[1]), 400, "bad_request")
    line_of(
        request(world.port, "POST", PROCESS, body or b"x", {"Content-Type": "multipart/form-data"}), 400, "bad_request"
    )


def test_other_methods_and_places(world):
    answer = request(world.port, "GET", GUIDE)
    assert line_of(answer, 405, "method_not_allowed") == "GET: only POST here"
    assert answer[2]["Allow"] == "POST"
    line_of(request(world.port, "POST", "/health", b"x"), 405, "method_not_allowed")
    line_of(request(world.port, "GET", "/elsewhere"), 404, "not_found")
    line_of(request(world.port, "BREW", PROCESS), 501, "bad_request")
    line_of(request(world.port, "POST", GUIDE, b"0\r\n\r\n", {"Transfer-Encoding": "chunked"}), 411, "length_required")
    line_of(request(world.port, "POST", GUIDE, b"{}", {"Content-Length": "-1"}), 411, "length_required")
    assert request(world.port, "GET", "/health")[:2] == (200, {"status": "ok"})
    assert request(world.port, "GET", "/ready")[:2] == (200, {"status": "ready"})


def test_a_model_that_answers_no_questions_says_so(tmp_path):
    class Mute:
        def sample(self, clip, question, turns=()):
            raise UserError("this checkpoint answers no questions: it names an emotion")

    with served(Mute(), tmp_path) as server:
        answer = request(server.port, "POST", PROCESS, {"text": "a", "question": "Why?"})
        assert line_of(answer, 400, "bad_request") == "this checkpoint answers no questions: it names an emotion"


def test_no_path_is_served_without_a_root(tmp_path):
    with served(Slow(), tmp_path) as server:
        answer = request(server.port, "POST", PROCESS, {"video_path": "a.mp4"})
        assert line_of(answer, 403, "outside_root") == "clips by path are not served here (--root): upload the clip"


def test_a_token(world, clips):
    world.server.service.token = "sesame é"
    try:
        body = {"video_path": clips[0].name}
        right = "sesame é".encode()
        good = [{"Authorization": b"Bearer " + right}, {"X-API-Key": right},
                {"Authorization": b"Basic " + serve.base64.b64encode(b"me:" + right)}]  # fmt: skip
        bad = [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer sesame"}, {"X-API-Key": "x"},
               {"Authorization": "Basic !"}, {"Authorization": "Basic c2VzYW1lIMOp"}]  # fmt: skip
        for headers in good:
            assert request(world.port, "POST", PROCESS, body, headers)[0] == 200
        for headers in bad:
            for method, path in (("POST", PROCESS), ("GET", "/"), ("GET", "/elsewhere")):
                answer = request(world.port, method, path, body if method == "POST" else None, headers)
                assert line_of(answer, 401, "unauthorized") == "the token is missing or wrong"
                assert answer[2]["WWW-Authenticate"].startswith("Basic ")
        for path in ("/health", "/ready", "/openapi.json"):
            assert request(world.port, "GET", path)[0] == 200
    finally:
        world.server.service.token = None


def test_a_large_body_is_refused_and_the_refusal_is_seen(world):
    """Its bytes are read and dropped, so that a client that sends before it listens gets the answer."""
    large = b"x" * (3 * 2**20)
    for headers in ({}, form()[1]):
        answer = request(world.port, "POST", PROCESS, large, headers)
        assert line_of(answer, 413, "too_large") == "the upload is larger than 1 MB"
        assert answer[1]["details"] == {"limit": 2**20, "given": len(large)}
        assert answer[2]["Connection"] == "close"
    with socket.create_connection(("127.0.0.1", world.port), 20) as client:  # one that asks first sends nothing
        head = f"POST {PROCESS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(large)}\r\nExpect: 100-continue\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_leave_is_given_for_a_body_that_is_wanted(world, clips):
    body = json.dumps({"video_path": clips[0].name}).encode()
    with socket.create_connection(("127.0.0.1", world.port), 20) as client:
        head = f"POST {PROCESS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_one_connection_for_many_requests(world, clips):
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=20)
    for body, status in (({"video_path": clips[0].name}, 200), ({"video_path": "gone"}, 404), ({"text": WORDS}, 200)):
        connection.request("POST", PROCESS, json.dumps(body))
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, True)
    connection.request("HEAD", "/health")
    answer = connection.getresponse()
    assert (answer.status, answer.read(), int(answer.headers["Content-Length"]) > 0) == (200, b"", True)
    connection.close()


class Slow:
    """Answers when it is let; the text is the clip's words."""

    def __init__(self):
        self.goes_on, self.asked, self.answered = threading.Event(), [], []

    def sample(self, clip, question, turns=()):
        if clip.text == "bad":
            raise ZeroDivisionError("secret")
        self.asked.append(clip.text)
        return clip, {}

    def answer(self, samples, question, missing, follow):
        self.answered += [clip.text for clip in samples]
        while not self.goes_on.wait(0.01):
            if not any([follow(clip.id, "so far") for clip in samples]):
                break
        return [{"id": clip.id, "emotion": clip.text, "available_modalities": [], "missing": {}} for clip in samples]


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def asking(port, text, answers):
    """A thread that asks and keeps the answer."""
    thread = threading.Thread(target=lambda: answers.append(request(port, "POST", PROCESS, {"text": text})))
    thread.start()
    return thread


def test_busy_and_what_frees_a_place(tmp_path):
    model, answers = Slow(), []
    with served(model, tmp_path, places=2) as server:
        thread = asking(server.port, "stays", answers)
        until(lambda: model.asked)
        head, body = b"POST /process_video HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n", b'{"text": "gone"}'
        for sent in (head, head + body[:5], head + body):  # it waits for a body, for the rest of it, for an answer
            with socket.create_connection(("127.0.0.1", server.port), 20) as client:
                client.sendall(sent)
                until(lambda: server.line.free == 0)
                answer = request(server.port, "POST", PROCESS, {"text": "late"})
                assert line_of(answer, 503, "busy") == "every place in the queue is taken: try again"
                assert answer[2]["Retry-After"] == "1"
                assert request(server.port, "GET", "/ready")[:2] == (503, {"status": "busy"})
            until(lambda: server.line.free == 1)  # a client that hangs up gives back its place
        model.goes_on.set()
        thread.join(20)
        assert answers[0][:2] == (200, answers[0][1])
        assert answers[0][1]["response"] == "stays"
        until(lambda: server.line.free == 2)
        assert model.answered == ["stays"]  # nobody waited for the others any more


def test_what_fails_in_the_server_stays_in_its_log(tmp_path, capsys):
    with served(Slow(), tmp_path) as server:
        answer = request(server.port, "POST", PROCESS, {"text": "bad"})
        assert line_of(answer, 500, "failed") == "the server failed at this request; its log says why"
        assert "secret" not in json.dumps(answer[1])
        assert "ZeroDivisionError: secret" in capsys.readouterr().err
        server.server.service.folder = tmp_path / "gone"  # where requests should have their folders
        line_of(request(server.port, "POST", PROCESS, {"text": "a"}), 500, "failed")
        assert str(tmp_path) in capsys.readouterr().err
        assert server.line.free == 32


def test_an_end_with_requests_in_flight(tmp_path):
    model, answers = Slow(), []
    with served(model, tmp_path, batch_size=1) as server:
        threads = [asking(server.port, str(i), answers) for i in range(4)]
        until(lambda: server.line.free == 28)
        sending = socket.create_connection(("127.0.0.1", server.port), 20)
        sending.sendall(b"POST /process_video HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{")
        until(lambda: server.line.free == 27)
        began = time.monotonic()
        server.server.stop()
        assert time.monotonic() - began < 8
        for thread in threads:
            thread.join(20)
        answers.append((int(sending.recv(12).split()[1]), json.loads(sending.recv(10_000).partition(b"\r\n\r\n")[2])))
        sending.close()
        for answer in answers:
            assert line_of(answer, 503, "stopping") == "the server is being stopped"
        assert len(answers) == 5
        with pytest.raises(ConnectionRefusedError):
            request(server.port, "GET", "/health")
        server.server.shutdown = server.server.server_close = lambda: None  # it is stopped again at the end
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_and_addresses_that_are_none(tmp_path):
    with served(Slow(), tmp_path) as server, pytest.raises(UserError) as error:
        serve.Server("127.0.0.1", server.port)
    assert str(error.value) == f"--host 127.0.0.1 --port {server.port}: Address already in use"
    for host, port in (("127.0.0.1", 70000), ("no.such.host.invalid", 0), ("192.0.2.1", 0)):
        with pytest.raises(UserError) as error:
            serve.Server(host, port)
        assert f"--port {port}: " in str(error.value)


def test_the_description_has_every_status(world):
    status, found, _ = request(world.port, "GET", "/openapi.json")
    assert status == 200
    assert found["openapi"].startswith("3.")
    assert list(found["paths"]) == [GUIDE, PROCESS, "/health", "/ready", "/openapi.json"]
    for path in (GUIDE, PROCESS):
        operation = found["paths"][path]["post"]
        assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
        assert set(operation["responses"]) == set(
            map(str, (200, 400, 401, 403, 404, 405, 408, 411, 413, 422, 500, 503))
        )
    answer = request(world.port, "POST", PROCESS, {"text": WORDS})[1]
    assert answer.keys() - {"response"} <= found["components"]["schemas"]["Answer"]["properties"].keys()
    assert set(found["components"]["schemas"]["Answer"]["required"]) <= answer.keys()
    named = set(serve.re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found)))
    assert named == set(found["components"]["schemas"])
