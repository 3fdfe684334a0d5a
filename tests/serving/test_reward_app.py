import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from hung_process import stop_when_seen
from ray import serve

from detox_ray.classifier_config import Calibration, ClassifierConfig
from detox_ray.config import RayConfig, RewardConfig
from detox_ray.errors import ConfigError, RewardError
from detox_ray.rewards.classifiers import load_classifier
from detox_ray.rewards.ensemble import with_calibrations
from detox_ray.serving.foreground import serve_session
from detox_ray.serving.reward_app import ClassifierDeployment, build_reward_app, deploy_reward_app
from detox_ray.serving.reward_client import RewardClient, fit_calibrations
from detox_ray.serving.texts import texts_to_read

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

APP = "reward-test"
TEXTS = ["you are a stupid idiot", "thank you for the kind help", "", "shut up fool", "have a nice day"]


def linear(function: str, name: str | None = None, **changes) -> ClassifierConfig:
    settings = {"calibration": "none", "output": "probability", **changes}
    return ClassifierConfig(name=name or function, kind="linear", model=f"faulty:{function}", **settings)


@pytest.fixture(scope="module")
def config(tiny_classifier: Path) -> RewardConfig:
    return RewardConfig(
        classifiers=[
            ClassifierConfig(name="tiny", kind="transformers", model=str(tiny_classifier), num_cpus=0.1),
            ClassifierConfig(
                name="words", kind="linear", model="profanity_check:predict_prob", calibration="none", replicas=2
            ),
        ],
        timeout_s=180,
    )


@pytest.fixture(scope="module")
def reward_app(config: RewardConfig, local_ray: Path) -> Iterator[RewardConfig]:
    """The app, and its configuration with the fitted calibration."""
    deploy_reward_app(config, APP)
    yield with_calibrations(config, fit_calibrations(config, APP, TEXTS))
    serve.delete(APP)


@pytest.fixture
def deploy(local_ray: Path) -> Iterator[Callable[[RewardConfig], RewardClient]]:
    """Deploys an app for one test."""

    def deploy(config: RewardConfig, release: str = "") -> RewardClient:
        if release:
            serve.run(build_reward_app(config, release=release), name="one-test", route_prefix=None)
        else:
            deploy_reward_app(config, "one-test")
        return RewardClient("one-test", config)

    yield deploy
    serve.delete("one-test")


def replica_pids(app: str, deployment: str) -> set[int]:
    title = f"ServeReplica:{app}:{deployment}"
    return {p.pid for p in psutil.process_iter(["cmdline"]) if title in " ".join(p.info["cmdline"] or [])}


def expected_scores(config: RewardConfig) -> list[float]:
    """The mean of the calibrated members, without Ray."""
    columns = []
    for classifier in config.classifiers:
        scores = load_classifier(classifier).score(TEXTS)
        if isinstance(classifier.calibration, Calibration):
            scores = (scores - classifier.calibration.mean) / classifier.calibration.std
        columns.append(scores)
    return list(np.mean(columns, axis=0))


def test_calibration_is_fitted_on_the_running_app(reward_app: RewardConfig, config: RewardConfig) -> None:
    raw = load_classifier(config.classifiers[0]).score(TEXTS)
    fitted = reward_app.classifiers[0].calibration
    assert isinstance(fitted, Calibration)
    assert (fitted.mean, fitted.std) == pytest.approx((raw.mean(), raw.std()), rel=1e-4)
    assert reward_app.classifiers[1].calibration == "none"
    scores = RewardClient(APP, reward_app).score(TEXTS)
    tiny = np.array([score.per_classifier["tiny"] for score in scores])
    assert (tiny.mean(), tiny.std()) == pytest.approx((0, 1), abs=1e-4)


def test_fitting_restarts_no_replica(reward_app: RewardConfig, config: RewardConfig) -> None:
    before = replica_pids(APP, "classifier-tiny") | replica_pids(APP, "ensemble")
    assert len(before) == 2
    assert with_calibrations(config, fit_calibrations(config, APP, TEXTS)) == reward_app
    assert replica_pids(APP, "classifier-tiny") | replica_pids(APP, "ensemble") == before


def test_an_uncalibrated_configuration_scores_nothing(reward_app: RewardConfig, config: RewardConfig) -> None:
    with pytest.raises(RewardError, match="'tiny' is not calibrated"):
        RewardClient(APP, config)
    with pytest.raises(RewardError, match="'tiny' is not calibrated"):
        serve.get_app_handle(APP).score.remote(TEXTS).result(timeout_s=30)


def test_scores_equal_the_classifiers_without_serve(reward_app: RewardConfig) -> None:
    scores = RewardClient(APP, reward_app).score(TEXTS)
    assert [s.reward for s in scores] == pytest.approx(expected_scores(reward_app), abs=1e-4)
    assert scores[0].reward < scores[1].reward
    raw = serve.get_app_handle(APP).raw_scores.remote(TEXTS).result(timeout_s=30)
    for classifier in reward_app.classifiers:
        np.testing.assert_allclose(raw[classifier.name], load_classifier(classifier).score(TEXTS), atol=1e-5)


def test_toxicity_and_no_text(reward_app: RewardConfig) -> None:
    assert RewardClient(APP, reward_app).score([]) == []
    toxicity = serve.get_app_handle(APP).toxicity.remote(TEXTS).result(timeout_s=30)
    assert toxicity["tiny"][0] > 0.5 > toxicity["tiny"][1]


def test_scores_may_be_collected_late(reward_app: RewardConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detox_ray.serving.reward_client.CLIENT_GRACE_S", 0.0)
    client = RewardClient(APP, reward_app.model_copy(update={"timeout_s": 0.5}))
    pending = client.submit(TEXTS)
    time.sleep(1)
    assert len(client.result(pending)) == len(TEXTS)


def test_no_port_is_opened(reward_app: RewardConfig) -> None:
    assert serve.status().proxies == {}


def test_a_serve_without_port_is_not_listened_at(reward_app: RewardConfig) -> None:
    message = r"http\.host=127\.0\.0\.1 http\.port=8000: Serve already runs without HTTP on this Ray"
    with pytest.raises(ConfigError, match=message), serve_session(RayConfig(), "127.0.0.1", 8000, None):
        pass
    assert serve.status().applications


def test_client_inside_a_ray_actor(reward_app: RewardConfig) -> None:
    @ray.remote(num_cpus=0.1)
    class Learner:
        def __init__(self, client: RewardClient) -> None:
            self._client = client

        def rewards(self, texts: list[str]) -> list[float]:
            first, second = self._client.submit(texts), self._client.submit(texts[::-1])
            assert [s.reward for s in self._client.result(second)][::-1] == pytest.approx(
                [s.reward for s in self._client.result(first)], abs=1e-4
            )
            return [s.reward for s in self._client.score(texts)]

    used = RewardClient(APP, reward_app)
    used.score(TEXTS)
    learner = Learner.remote(pickle.loads(pickle.dumps(used)))
    rewards = ray.get(learner.rewards.remote(TEXTS), timeout=60)
    ray.kill(learner)
    assert rewards == pytest.approx(expected_scores(reward_app), abs=1e-4)


@pytest.mark.parametrize("deployment", ["classifier-tiny", "ensemble"])
@pytest.mark.parametrize("in_flight", [False, True])
def test_a_killed_replica_costs_only_time(reward_app: RewardConfig, deployment: str, in_flight: bool) -> None:
    client = RewardClient(APP, reward_app)
    texts = TEXTS * (2000 if in_flight else 1)
    expected = [s.reward for s in client.score(TEXTS)] * (2000 if in_flight else 1)
    [pid] = replica_pids(APP, deployment)
    killer = threading.Timer(0.3 if in_flight else 0.0, psutil.Process(pid).kill)
    killer.start()
    if not in_flight:
        killer.join()
    scores = client.score(texts)
    assert not killer.is_alive()
    assert [s.reward for s in scores] == pytest.approx(expected, abs=1e-4)
    assert replica_pids(APP, deployment) != {pid}


def test_a_member_that_fails_twice_is_asked_again(deploy: Callable) -> None:
    client = deploy(RewardConfig(classifiers=[linear("rude_words"), linear("fails_twice")], retries=2))
    assert [s.reward for s in client.score(["you idiot", "friend"])] == pytest.approx([0.1, 0.8])


def test_a_member_that_keeps_failing_is_an_error_with_its_name(deploy: Callable) -> None:
    client = deploy(RewardConfig(classifiers=[linear("rude_words"), linear("always_fails")], retries=1))
    with pytest.raises(RewardError, match="'always_fails' failed 2 times: ConnectionError: the line is down"):
        client.score(["friend"])


def test_what_a_classifier_in_a_service_raises_reaches_nobody_with_a_text(deploy: Callable, local_ray: Path) -> None:
    config = RewardConfig(classifiers=[linear("quotes_the_text")], retries=0)
    client = deploy(config, release="of a service")
    with pytest.raises(RewardError, match=r"ValueError at .*faulty\.py:\d+ in quotes_the_text \(its message") as error:
        client.score(["xyzzyfrotz"])
    assert "xyzzyfrotz" not in str(error.value)
    logs = [path.read_text(errors="replace") for path in (local_ray / "logs").rglob("*") if path.is_file()]
    assert any("in quotes_the_text" in log for log in logs)
    assert not any("xyzzyfrotz" in log for log in logs)


def test_answers_that_are_not_scores_and_answers_that_do_not_come(deploy: Callable) -> None:
    client = deploy(RewardConfig(classifiers=[linear("rude_words"), linear("not_finite")], retries=0))
    with pytest.raises(RewardError, match=r"'not_finite'.*not finite"):
        client.score(["friend"])
    client = deploy(RewardConfig(classifiers=[linear("rude_words"), linear("slow")], timeout_s=1))
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"'slow' did not answer within reward\.timeout_s=1 s"):
        client.score(["friend"])
    assert time.monotonic() - start < 3


def test_the_next_call_waits_for_one_that_was_given_up(deploy: Callable) -> None:
    client = deploy(RewardConfig(classifiers=[linear("slow_and_alone")], timeout_s=3, retries=0))
    with pytest.raises(RewardError, match="'slow_and_alone' did not answer within"):
        client.score(["slow"])
    assert [s.reward for s in client.score(["friend"])] == pytest.approx([0.8])


def test_a_call_whose_turn_comes_too_late_computes_nothing() -> None:
    deployment = ClassifierDeployment(linear("a_second"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(deployment.read, ["friend"])
        time.sleep(0.3)
        start = time.monotonic()
        for method in (deployment.score, deployment.toxicity, deployment.read):
            with pytest.raises(TimeoutError, match=r"busy for 0\.05 s"):
                method(["friend"], left_s=0.05)
        assert time.monotonic() - start < 0.6
        assert not first.done()
        # Who has time waits, and nobody holds the turn for ever.
        assert deployment.score(["friend"], left_s=30) == deployment.score(["friend"]) == pytest.approx([0.8])


def test_a_long_call_ends_once_nobody_waits_for_it(tiny_classifier: Path) -> None:
    tiny = ClassifierConfig(name="tiny", kind="transformers", model=str(tiny_classifier), batch_size=1)
    deployment = ClassifierDeployment(tiny)
    start = time.monotonic()
    assert deployment.read(["thank you friend"] * 300, left_s=300).score.shape == (300,)
    whole_s = time.monotonic() - start
    start = time.monotonic()
    for method in (deployment.score, deployment.toxicity, deployment.read):
        with pytest.raises(TimeoutError, match="'tiny' was not done in the time it was given") as error:
            method(["thank you friend"] * 3000, left_s=whole_s / 10)
        assert "friend" not in str(error.value)
    assert deployment.read(["thank you friend"], left_s=300).score.shape == (1,)
    assert time.monotonic() - start < 10 * whole_s


def test_a_constant_classifier_cannot_be_calibrated(deploy: Callable) -> None:
    config = RewardConfig(classifiers=[linear("length", calibration="fit"), linear("constant", calibration="fit")])
    deploy_reward_app(config, "one-test")
    with pytest.raises(RewardError, match="'constant'"):
        fit_calibrations(config, "one-test", TEXTS)


def test_prompts_are_read_when_the_configuration_says_so(deploy: Callable) -> None:
    config = RewardConfig(classifiers=[linear("length")], text="prompt_and_response")
    client = deploy(config)
    [score] = client.score(["friend"], ["hello my"])
    assert score.reward == pytest.approx(1 - len("hello my friend") / 100)
    with pytest.raises(RewardError, match="needs a prompt"):
        client.score(["friend"])
    assert texts_to_read(["!", " b", ""], ["a", "a", "a"], config) == ["a!", "a b", "a"]


def test_a_classifier_that_does_not_fit_is_not_deployed(tiny_classifier: Path) -> None:
    model = ClassifierConfig(name="t", kind="transformers", model=str(tiny_classifier), label="unknown")
    with pytest.raises(ConfigError, match="neutral"):
        deploy_reward_app(RewardConfig(classifiers=[model]), "never")
    assert "never" not in serve.status().applications


def test_a_replica_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detox_ray.serving.reward_app.check_classifier", lambda _: None)
    with pytest.raises(RewardError, match=r"'broken'.* cannot be imported"):
        deploy_reward_app(RewardConfig(classifiers=[linear("no_such_function", "broken")]), "never")
    assert "never" not in serve.status().applications


@pytest.mark.parametrize(("how", "times", "patience_s"), [(signal.SIGSTOP, 1, 30), (signal.SIGKILL, 2, 180)])
def test_a_classifier_that_hangs_or_dies_while_it_starts_is_started_anew(
    deploy: Callable, how: signal.Signals, times: int, patience_s: float
) -> None:
    lost = stop_when_seen("ServeReplica:one-test:classifier-rude_words", how, times)
    client = deploy(RewardConfig(classifiers=[linear("rude_words")], start_timeout_s=patience_s))
    assert len(client.score(TEXTS)) == len(TEXTS)
    _, left = psutil.wait_procs(lost.result(), timeout=60)
    assert not left


def test_a_perspective_member_over_two_replicas(deploy: Callable, tmp_path: Path) -> None:
    from perspective_server import PerspectiveServer, score

    server = PerspectiveServer(key=None)
    settings = {"address": server.address, "api_key_env": None, "requests_per_second": 100, "cache": f"{tmp_path}/c"}
    member = {"name": "api", "kind": "perspective", "perspective": settings, "replicas": 2, "batch_size": 1}
    client = deploy(RewardConfig(classifiers=[ClassifierConfig(**member, output="probability", calibration="none")]))
    texts = ["you fool", "have a nice day", "you fool", "what a fine day"]
    try:
        scores = client.score(texts)
        assert [s.reward for s in scores] == pytest.approx([1 - score(text, "TOXICITY") for text in texts], abs=1e-6)
        with pytest.raises(RewardError, match=r"'api' failed .* 1 of 2 texts were refused \(1 COMMENT_EMPTY\)"):
            client.score([*texts, ""])
        assert server.received == dict.fromkeys(texts, 1)
    finally:
        server.stop()


def test_an_app_that_is_not_running() -> None:
    config = RewardConfig(classifiers=[linear("rude_words")])
    with pytest.raises(RewardError, match="'absent' is not running"):
        RewardClient("absent", config).score(["friend"])
