"""A chat server of this test process: it answers, stalls, errs and dies as a test wants."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reply(text, tokens_in=10, tokens_out=3):
    """The body of a chat completion."""
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}).encode()


class Server:
    """`answer(messages, n)` gives a reply's text, or one of: ("status", code), ("stall", seconds), ("cut",), bytes.

    n counts from 0 how often exactly these messages were asked before.
    """

    def __init__(self, answer, port=0):
        self.answer, self.lock = answer, threading.Lock()
        self.requests, self.headers, self.seen = [], [], {}
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self.handler())
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def handler(server):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = json.dumps(body["messages"])
                with server.lock:
                    n = server.seen[key] = server.seen.get(key, -1) + 1
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                found = server.answer(body["messages"], n)
                with contextlib.suppress(OSError):  # who asked has gone
                    self.give(found)

            def give(self, found):
                if isinstance(found, str):
                    found = reply(found)
                if isinstance(found, bytes):
                    return self.send(200, found)
                kind, *value = found
                if kind == "status":
                    return self.send(value[0], b'{"error": {"message": "because"}}', value[1] if value[1:] else {})
                if kind == "stall":
                    time.sleep(value[0])
                    return None
                self.send_response(200)  # cut off in the middle of a body
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(reply("7")[:20])
                return None

            def send(self, status, body, headers=()):
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@contextlib.contextmanager
def serving(answer, port=0):
    server = Server(answer, port)
    try:
        yield server
    finally:
        server.close()
