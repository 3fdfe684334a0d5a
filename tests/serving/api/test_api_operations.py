"""Queue, keys, cache, batches, metrics, lost replicas and updates of the running service."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from detox_ray.config import RayConfig, RewardConfig
from detox_ray.errors import ConfigError, RewardError
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.foreground import deleted_at_the_end, serve_session
from detox_ray.serving.http_api import build_http_app
from detox_ray.serving.serve_api import APP_NAME, serve_api

from .conftest import linear, serve_as

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

RUDE = "you are a stupid idiot"


def metric(client: httpx.Client, name: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def test_health_readiness_and_docs(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    page = client.get("/docs").text
    assert "http://" not in page.replace(str(client.base_url), "")
    assert "https://" not in page
    schema = client.get("/openapi.json").json()
    posts = {path: operation["post"] for path, operation in schema["paths"].items() if "post" in operation}
    assert len(posts) == 4
    for path, operation in posts.items():
        assert f"POST {path}" in page
        # No other error is promised than those there are.
        assert set(operation["responses"]) == {"200", "default"}
        examples = operation["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            assert client.post(path, json=example["value"]).status_code == 200


def test_single_texts_are_put_together(client: httpx.Client) -> None:
    calls, texts = metric(client, "detox_batch_texts_count"), metric(client, "detox_batch_texts_sum")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: client.post("/v1/score", json={"text": f"{RUDE} {i}"}), range(96)))
    assert {answer.status_code for answer in answers} == {200}
    assert metric(client, "detox_batch_texts_sum") - texts == 96
    assert metric(client, "detox_batch_texts_count") - calls < 60


def test_a_text_seen_before_comes_from_the_cache(client: httpx.Client) -> None:
    first = client.post("/v1/score", json={"texts": ["plover", "plover"]}).json()
    read, hits = metric(client, "detox_batch_texts_sum"), metric(client, "detox_cache_hits_total")
    again = client.post("/v1/score", json={"texts": ["plover", "plover"]}).json()
    assert again == first
    assert metric(client, "detox_batch_texts_sum") == read
    assert metric(client, "detox_cache_hits_total") == hits + 2


def test_do_not_store_keeps_a_text_out_of_the_cache(client: httpx.Client) -> None:
    request = {"comment": {"text": "plugh"}, "requestedAttributes": {"TOXICITY": {}}, "doNotStore": True}
    client.post("/v1alpha1/comments:analyze", json=request)
    read = metric(client, "detox_batch_texts_sum")
    client.post("/v1alpha1/comments:analyze", json=request)
    assert metric(client, "detox_batch_texts_sum") == read + 1


def test_a_full_queue_says_when_to_come_back(deploy: Callable[..., str]) -> None:
    limits = {"texts": 2, "spans": 1, "queued_texts": 3, "timeout_s": 20}
    address = deploy([linear("slow", "faulty:a_second")], limits=limits, cache_texts=0)
    paths = {
        "/v1/score": lambda i: {"text": f"{i}"},
        "/v1/moderations": lambda i: {"input": f"{i}"},
        "/v1alpha1/comments:analyze": lambda i: {"comment": {"text": f"{i}"}, "requestedAttributes": {"TOXICITY": {}}},
    }
    with httpx.Client(base_url=address, timeout=60) as asking, ThreadPoolExecutor(24) as pool:
        requests = [(path, body(i)) for i in range(8) for path, body in paths.items()]
        answers = list(pool.map(lambda request: asking.post(request[0], json=request[1]), requests))
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 30
                assert "error" in answer.json()
        assert metric(asking, "detox_queued_texts") == 0


def test_the_http_section_and_a_classifier_that_is_too_slow(deploy: Callable[..., str]) -> None:
    http = {"cors_origins": ["https://example.org"], "public_url": "https://toxicity.example.org"}
    address = deploy([linear("slow", "faulty:slow")], limits={"timeout_s": 1}, http=http)
    page = httpx.get(f"{address}/$discovery/rest", headers={"origin": "https://example.org"}, timeout=30)
    assert page.headers["access-control-allow-origin"] == "https://example.org"
    readable = {"Retry-After", "X-Text-Windows", "X-Unscored-Categories"}
    assert set(page.headers["access-control-expose-headers"].split(", ")) == readable
    asked = "content-type,x-goog-api-client,x-stainless-lang"
    preflight = {
        "origin": "https://example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": asked,
    }
    allowed = httpx.options(f"{address}/v1/moderations", headers=preflight, timeout=30)
    assert (allowed.status_code, allowed.headers["access-control-allow-headers"]) == (200, asked)
    assert page.json()["rootUrl"] == "https://toxicity.example.org/"
    ours = httpx.post(f"{address}/v1/score", json={"text": "a"}, timeout=30)
    assert (ours.status_code, ours.json()["error"]["limit"]) == (504, 1)
    request = {"comment": {"text": "b"}, "requestedAttributes": {"TOXICITY": {}}}
    theirs = httpx.post(f"{address}/v1alpha1/comments:analyze", json=request, timeout=30)
    assert (theirs.status_code, theirs.json()["error"]["status"]) == (504, "DEADLINE_EXCEEDED")


def test_keys_of_the_running_service(deploy: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS_OF_A_TEST", "right,other")
    keys = {"environment": "KEYS_OF_A_TEST", "requests_per_second": 0.01, "burst": 3}
    address = deploy([linear("rude_words", "faulty:rude_words")], keys=keys)
    with httpx.Client(base_url=address, timeout=30) as asking:
        body = {"text": RUDE}
        assert asking.post("/v1/score", json=body).status_code == 401
        assert asking.get("/metrics").status_code == 401
        assert asking.get("/healthz").status_code == 200
        assert (
            asking.get("/$discovery/rest", params={"version": "v1alpha1", "key": "right"}).json()["rootUrl"]
            == f"{address}/"
        )
        assert [asking.post("/v1/score?key=right", json=body).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert asking.post("/v1/score", json=body, headers={"authorization": "Bearer other"}).status_code == 200
        assert "access-control-allow-origin" not in asking.get("/healthz", headers={"origin": "https://e.org"}).headers


@contextmanager
def load(address: str, body: dict, threads: int = 4) -> Iterator[list[tuple[int, str]]]:
    """Clients that ask all the time, each time a text of their own; yields statuses, each with its score or error."""
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        count = 0
        with httpx.Client(base_url=address, timeout=60) as asking:
            while not stop.is_set():
                count += 1
                time.sleep(0.02)  # leaves the replicas the processor they start on
                try:
                    response = asking.post("/v1/score", json={"text": f"{body['text']} {number} {count}"})
                    score = response.json()["results"][0]["score"] if response.status_code == 200 else None
                    answers.append((response.status_code, response.text if score is None else f"{score:.3f}"))
                except httpx.HTTPError as error:
                    answers.append((0, type(error).__name__))

    workers = [threading.Thread(target=ask, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield answers
    finally:
        stop.set()
        for worker in workers:
            worker.join(90)


def wait_for(answers: list, more: int) -> None:
    deadline, enough = time.monotonic() + 60, len(answers) + more
    while len(answers) < enough:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def rude(address: str) -> Iterator[str]:
    """The address of one service for all that follows: its replicas are killed, then it is updated."""
    serve_as("rude", [linear("rude_words", "faulty:rude_words")], cache_texts=0)
    yield f"{address}/rude"
    serve.delete("rude")


def kill_replica(deployment: str) -> None:
    title = f"ServeReplica:rude:{deployment}"
    [process] = [p for p in psutil.process_iter(["cmdline"]) if title in " ".join(p.info["cmdline"] or [])]
    process.kill()


@pytest.mark.parametrize("deployment", ["classifier-rude_words", "ensemble"])
def test_a_killed_replica_under_load_costs_only_time(rude: str, deployment: str) -> None:
    with load(rude, {"text": RUDE}) as answers:
        wait_for(answers, 20)
        kill_replica(deployment)
        wait_for(answers, 40)
    # 1 - 0.9, whatever happened.
    assert set(answers) == {(200, "0.100")}


def test_a_killed_http_replica_fails_only_what_it_held(rude: str) -> None:
    with load(rude, {"text": RUDE}, threads=4) as answers:
        wait_for(answers, 20)
        kill_replica("toxicity-api")
        wait_for(answers, 40)
    failed = [status for status, _ in answers if status != 200]
    # One request a client was in the replica's hands; Serve answers those itself.
    assert set(failed) <= {500, 503}
    assert len(failed) <= 4
    assert {score for status, score in answers if status == 200} == {"0.100"}


def test_an_update_under_load_fails_no_request(rude: str) -> None:
    members = [linear("rude_words", "faulty:rude_words"), linear("constant", "faulty:constant")]
    with load(rude, {"text": RUDE}) as answers:
        wait_for(answers, 20)
        serve_as("rude", members, cache_texts=0, batching={"texts": 8})
        wait_for(answers, 20)
    assert {status for status, _ in answers} == {200}
    # One member before, the mean of two after.
    assert {score for _, score in answers} == {"0.100", "0.300"}


SERVE = """
from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import RewardConfig
from detox_ray.serving.api_config import ApiConfig
from detox_ray.serving.serve_api import serve_api
slow = ClassifierConfig(name="slow", kind="linear", model="faulty:slow", output="probability")
config = {"reward": RewardConfig(classifiers=[slow]), "http": {"port": PORT}, "ray": {"num_cpus": 1}}
serve_api(ApiConfig.model_validate(config), on_ready=lambda address: print(address, flush=True))
"""


def test_a_port_that_is_taken_is_said_at_once(address: str) -> None:
    port = int(address.rpartition(":")[2])
    code = f"""
from detox_ray.serving.api_config import load_api_config
from detox_ray.serving.serve_api import serve_api
serve_api(load_api_config(None, ["http.port={port}"]), on_ready=print)
"""
    service = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"ConfigError: http.host=127.0.0.1 http.port={port}: " in service.stderr


def test_a_serve_that_already_listens_is_used_where_it_listens(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with serve_session(RayConfig(), "127.0.0.1", port, None) as found:
        assert found == address
    for host, other in (("127.0.0.1", port - 1), ("0.0.0.0", port)):
        message = f"http.host={host} http.port={other}: Serve already runs on 127.0.0.1:{port} on this Ray"
        with pytest.raises(ConfigError, match=re.escape(message)), serve_session(RayConfig(), host, other, None):
            pass


def test_an_app_that_is_interrupted_before_it_is_ready_is_deleted(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    def interrupted(address: str) -> None:
        served.append(set(serve.status().applications))
        raise KeyboardInterrupt

    # The root belongs to another app of these tests.
    monkeypatch.setattr("detox_ray.serving.serve_api.ROUTE", "/elsewhere")
    port = int(address.rpartition(":")[2])
    reward = RewardConfig(classifiers=[linear("rude_words", "faulty:rude_words")])
    config = ApiConfig.model_validate({"reward": reward, "http": {"port": port}})
    with pytest.raises(KeyboardInterrupt):
        serve_api(config, on_ready=interrupted)
    assert APP_NAME in served[0]
    assert APP_NAME not in serve.status().applications


def test_what_went_wrong_first_is_told_when_the_app_cannot_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("the controller is gone")

    monkeypatch.setattr(serve, "delete", fail)
    with pytest.raises(RewardError, match="no start"), deleted_at_the_end("some"):
        raise RewardError("no start")
    with pytest.raises(RuntimeError, match="controller is gone"), deleted_at_the_end("some"):
        pass


def test_the_foreground_service_finishes_what_it_has_begun(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = SERVE.replace("PORT", str(port))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with (
        subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, cwd=tmp_path
        ) as service,
        ThreadPoolExecutor(1) as pool,
    ):
        try:
            assert service.stdout is not None
            assert service.stdout.readline().decode().strip() == f"http://127.0.0.1:{port}"
            body = {"text": RUDE}
            answer = pool.submit(httpx.post, f"http://127.0.0.1:{port}/v1/score", json=body, timeout=60)
            time.sleep(1)
            service.terminate()
            assert answer.result().status_code == 200
            assert service.wait(60) == 0
        finally:
            service.kill()


def test_the_embedded_service_works_offline(address: str) -> None:
    serve.run(build_http_app(ApiConfig()), name="embedded", route_prefix="/embedded")
    try:
        body = {"comment": {"text": RUDE}, "requestedAttributes": {"TOXICITY": {}}}
        response = httpx.post(f"{address}/embedded/v1alpha1/comments:analyze", json=body, timeout=60)
        assert response.json()["attributeScores"]["TOXICITY"]["summaryScore"]["value"] > 0.5
    finally:
        serve.delete("embedded")
