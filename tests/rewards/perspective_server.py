"""A server on loopback that speaks Perspective API's published formats, and counts what it is asked."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.rewards.classifiers import load_classifier
from detox_ray.rewards.perspective import PerspectiveClassifier

KEY = "AIzaSyNotARealKey0123456789"
KNOWN = ["TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT"]
LIMIT_BYTES = 20_480


def score(text: str, attribute: str) -> float:
    """What the server thinks of a text; each attribute has a number of its own."""
    return round((0.9 if "fool" in text else 0.1) - 0.01 * KNOWN.index(attribute), 4)


def published_error(code: int, message: str, error_type: str | None = None, **more: Any) -> dict[str, Any]:
    status = {400: "INVALID_ARGUMENT", 403: "PERMISSION_DENIED", 429: "RESOURCE_EXHAUSTED"}.get(code, "INTERNAL")
    error: dict[str, Any] = {"code": code, "message": message, "status": status}
    if error_type:
        type_url = "type.googleapis.com/google.commentanalyzer.v1alpha1.Error"
        error["details"] = [{"@type": type_url, "errorType": error_type, **more}]
    return {"error": error}


class _HTTPServer(ThreadingHTTPServer):
    # With the standard five, connections made at once wait a second for the kernel to try again.
    request_queue_size = 128


class PerspectiveServer:
    """Answers at `address` until `stop`; the lists and counters may be read at any time."""

    def __init__(self, port: int = 0, delay_s: float = 0.0, key: str | None = KEY) -> None:
        self.key = key
        self.delay_s = delay_s
        self.received: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.arrivals: list[float] = []
        self.requests: list[dict[str, Any]] = []
        self.most_at_once = 0
        self.next_answers: list[tuple[int, dict[str, str], Any]] = []
        """Taken before anything else; status 0 drops the connection."""
        self.dies_after: int | None = None
        self.holds: str | None = None
        self.holding = threading.Event()
        self.released = threading.Event()
        self._dead = False
        self._at_once = 0
        self._lock = threading.Lock()
        self._http = _HTTPServer(("127.0.0.1", port), self._handler())
        self.port = self._http.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._dead = True
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        text = body["comment"]["text"]
        with self._lock:
            self.received[text] += 1
            self.arrivals.append(time.monotonic())
            self.requests.append(body)
            if self.dies_after is not None and sum(self.answered.values()) >= self.dies_after:
                self._dead = True
            if self._dead:
                return 0, {}, None
            if self.next_answers:
                return self.next_answers.pop(0)
        if text == self.holds:
            self.holding.set()
            self.released.wait(60)
        time.sleep(self.delay_s)
        status, answer = self._judge(urlsplit(path), body, text)
        return status, {}, answer

    def _judge(self, url: Any, body: dict[str, Any], text: str) -> tuple[int, Any]:
        if url.path != "/v1alpha1/comments:analyze":
            return 404, published_error(404, "Not found")
        if parse_qs(url.query).get("key", [None]) != [self.key]:
            return 400, published_error(400, "API key not valid. Please pass a valid API key.")
        if not text:
            return 400, published_error(400, "Comment must be non-empty.", "COMMENT_EMPTY")
        if (size := len(text.encode())) > LIMIT_BYTES:
            message = f"Comment text was too many bytes. Value ({size}) exceeded limit ({LIMIT_BYTES})."
            return 400, published_error(400, message)
        if unknown := [name for name in body["requestedAttributes"] if name not in KNOWN]:
            return 400, published_error(400, f"Unknown requested attribute: {unknown[0]}", "INVALID_REQUEST")
        if not text.isascii():
            return 400, published_error(
                400,
                "Attribute TOXICITY does not support request languages: is",
                "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
                languageNotSupportedByAttributeError={"detectedLanguages": ["is"], "attribute": "TOXICITY"},
            )
        if text.isdigit():
            return 400, published_error(400, "Unable to detect language.", "LANGUAGE_DETECTION_FAILED")
        scores = {
            name: {
                "spanScores": [
                    {"begin": 0, "end": len(text), "score": {"value": score(text, name), "type": "PROBABILITY"}}
                ],
                "summaryScore": {"value": score(text, name), "type": "PROBABILITY"},
            }
            for name in body["requestedAttributes"]
        }
        return 200, {"attributeScores": scores, "languages": ["en"], "detectedLanguages": ["en"]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                try:
                    status, headers, answer = server._answer(self.path, body)
                    if status == 0:
                        self.close_connection = True
                        return
                    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                    self.wfile.flush()
                    if status == 200:
                        with server._lock:
                            server.answered[body["comment"]["text"]] += 1
                except BrokenPipeError:
                    # The client was killed, as tests do; what it did not get does not count as answered.
                    self.close_connection = True
                finally:
                    with server._lock:
                        server._at_once -= 1

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


def config(server: PerspectiveServer, perspective: dict[str, Any] | None = None, **changes: Any) -> ClassifierConfig:
    settings = {"address": server.address, "requests_per_second": 500, "timeout_s": 10, **(perspective or {})}
    return ClassifierConfig(**{"name": "api", "kind": "perspective", "perspective": settings, **changes})


def load(server: PerspectiveServer, perspective: dict[str, Any] | None = None, **changes: Any) -> PerspectiveClassifier:
    classifier = load_classifier(config(server, perspective, **changes))
    assert isinstance(classifier, PerspectiveClassifier)
    return classifier
