"""A server in this process, and requests to it."""

import base64
import http.client
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from tools import serve
from tools.batching import Line


@contextmanager
def served(predictor, folder, places=32, batch_size=8, **settings):
    """A server whose requests have their folders below `folder`; its port and its line."""
    server = serve.Server("127.0.0.1", 0)
    line, limits = Line(predictor, places, batch_size), {"max_bytes": 2**20, "max_seconds": 20.0, "token": None}
    server.start(serve.Service(line, Path(folder), settings.pop("root", None), **limits | settings))
    try:
        yield SimpleNamespace(port=server.server_port, line=line, server=server)
    finally:
        server.stop()


def request(port, method, path, body=None, headers=None):
    """Status, JSON and headers of an answer; `body` may be bytes or what JSON holds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()


def form(**fields):
    """Body and headers of a multipart form; a path is sent as a file."""
    parts = []
    for name, value in fields.items():
        file = isinstance(value, Path)
        more = f'; filename="{value.name}"\r\nContent-Type: video/mp4' if file else ""
        content = value.read_bytes() if file else value.encode()
        parts.append(
            f'--x1\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return b"".join(parts) + b"--x1--\r\n", {"Content-Type": "multipart/form-data; boundary=x1"}


def data_url(path, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
