"""A chat-completions endpoint on this machine that misbehaves as it is told."""

import json
import re
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# The answers under test say what they are; a prompt's last such mark is what it is to rate.
MARK = re.compile(r"answer (\d+\.\d)")
SILENCE = 1.5  # seconds; a judge that is to meet it waits less
SLOW = 0.2
TOGETHER = 4  # calls


class JudgeEndpoint(ThreadingHTTPServer):
    """Answers each request by the next behaviour planned for its mark; the last one stays.

    A behaviour is the text of the judgment, or one of: silent, slow, together (answers when so many
    calls are under way), limited (429), broken (500), refused (400), not_json, no_choices, no_text.
    Without a plan it is `judgment`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.judgment = "Rating: [[5]]"
        self.version = "stub-2024"
        self.usage: dict | None = None  # told with each completion
        self.plans: dict[str, list[str]] = {}
        self.asked: dict[str, list[dict]] = defaultdict(list)  # mark -> requests
        self.keys: set[str] = set()
        self.at_a_time = self.most_at_a_time = 0
        self.lock = threading.Lock()
        self.together = threading.Barrier(TOGETHER, timeout=20)

    @property
    def calls(self) -> int:
        return sum(map(len, self.asked.values()))

    def handle_error(self, request, client_address):
        """A client that stopped waiting is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeEndpoint

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mark = MARK.findall(body["messages"][-1]["content"])[-1]
        with self.server.lock:
            plan = self.server.plans.get(mark, [self.server.judgment])
            what = plan[min(len(self.server.asked[mark]), len(plan) - 1)]
            self.server.asked[mark].append({"path": self.path, **body})
            self.server.keys.add(self.headers["Authorization"])
            self.server.at_a_time += 1
            self.server.most_at_a_time = max(self.server.most_at_a_time, self.server.at_a_time)
        try:
            response = self._behave(what)
        finally:
            with self.server.lock:
                self.server.at_a_time -= 1
        self._send(*response)

    def _behave(self, what):
        """Status, body and headers of the response."""
        if what == "silent":
            time.sleep(SILENCE)
        elif what == "slow":
            time.sleep(SLOW)
        elif what == "together":
            self.server.together.wait()
        elif what == "limited":
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": "0.1"}
        elif what == "broken":
            return 500, {"error": {"message": "out of order"}}
        elif what == "refused":
            return 400, {"error": {"message": "prompt too long"}}
        elif what == "not_json":
            return 200, "<html>Welcome!</html>"
        elif what == "no_choices":
            return 200, {"object": "chat.completion", "choices": []}
        elif what == "no_text":
            return 200, self._completion(None)
        else:
            return 200, self._completion(what)
        return 200, self._completion(self.server.judgment)

    def _completion(self, text):
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": self.server.version,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                }
            ],
            **({"usage": self.server.usage} if self.server.usage else {}),
        }

    def _send(self, status, body, headers=()):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def judge_endpoint():
    """A JudgeEndpoint that listens."""
    with JudgeEndpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
