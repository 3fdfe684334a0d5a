"""The playground by the command line: a small run with all three systems, in the gradio client and in a browser."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import torch
import yaml
from browser import CHROMIUM, Browser
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from detox_ray.metrics_file import STEPS_FILE
from detox_ray.serving.playground.page import QUEUE
from detox_ray.serving.playground.request import AnswerRequest, to_permalink

pytestmark = pytest.mark.e2e
COMMAND = str(Path(sys.executable).with_name("detox-ray"))
MARK = "zebrafish"
REQUEST = AnswerRequest(prompt=f"A {MARK} & <b>I</b>", temperature=1.0, top_p=0.9, max_new_tokens=24, seed=7)
STATE = "document.querySelector('.answers')?.dataset.state"
TEXTS = "[...document.querySelectorAll('.answers .text')].map((text) => text.innerText)"


def make_run(folder: Path, model: str) -> Path:
    """A finished run of a tiny model, which began with an adapter, with two adapters that change it at random."""
    for name, seed in (("fine-tuned", 1), ("run/adapter", 2)):
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder / name)
    (folder / "run" / "adapter" / STEPS_FILE).write_text("3")
    texts = ["what a lovely day", "you are so", "you stupid idiot are", "this is the", "damn you and"]
    (folder / "prompts.txt").write_text("\n".join(texts))
    config = {
        "name": "run",
        "output_dir": str(folder),
        "data": {"source": str(folder / "prompts.txt"), "heldout_prompts": 4},
        "policy": {"model": model, "adapter": str(folder / "fine-tuned"), "lora": {"rank": 4, "alpha": 8}},
        "reward": {"classifiers": [{"name": "lab-linear", "kind": "linear", "model": "lab:linear"}]},
        "evaluation": {"prompts": 4},
        "train": {"total_steps": 3},
        "ray": {"num_cpus": 2},
    }
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "run"


@dataclass
class Playground:
    address: str
    process: subprocess.Popen[str]
    ray_folder: Path


@pytest.fixture(scope="module")
def playground(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    """The page, as soon as it is there: the models may still be loading."""
    run = make_run(tmp_path_factory.mktemp("playground"), tiny_model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A short path: Ray puts sockets there.
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        process = subprocess.Popen(
            [COMMAND, "playground", str(run), "--port", str(port)],
            env=os.environ | {"RAY_TMPDIR": ray_folder, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert f"http://127.0.0.1:{port}" in said, said
            yield Playground(f"http://127.0.0.1:{port}", process, Path(ray_folder))
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def browser(playground: Playground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def ask(browser: Browser) -> list[str]:
    """Press Answer once it can be; what the cards say in the end."""
    browser.wait_for("!document.querySelector('#ask').disabled")
    browser.evaluate("document.querySelector('.answers').dataset.state = 'before'")
    browser.click("#ask")
    browser.wait_for(f"{STATE} == 'done'")
    return browser.evaluate(TEXTS)


def test_the_page_is_there_before_the_models_and_says_so(playground: Playground, browser: Browser) -> None:
    browser.open(playground.address, width=1280)
    assert "loading the" in browser.wait_for("document.querySelector('.notice.loading')?.innerText")
    assert browser.evaluate("document.querySelector('#ask').disabled")
    assert browser.wait_for("[...document.querySelectorAll('.answers h3')].map((h) => h.firstChild.data.trim())") == [
        "Base",
        "Fine-tuned",
        "RLAF",
    ]
    browser.wait_for("!document.querySelector('#ask').disabled", timeout_s=120)


def test_a_permalink_fills_the_form_and_gives_the_same_answers(playground: Playground, browser: Browser) -> None:
    browser.open(f"{playground.address}/#{to_permalink(REQUEST)}", width=1280)
    browser.wait_for(f"document.querySelector('#prompt textarea')?.value == {REQUEST.prompt!r}")
    browser.click(".label-wrap")
    assert browser.wait_for("document.querySelector('#seed input')?.value") == "7"
    texts = ask(browser)
    assert len(set(texts)) == 3
    link = browser.evaluate("location.href")
    assert urlsplit(link).fragment == to_permalink(REQUEST)
    browser.click("#new-seed")
    browser.wait_for("document.querySelector('#seed input').value != '7'")
    assert ask(browser) != texts
    browser.open(link, width=1280)
    browser.wait_for(f"document.querySelector('#prompt textarea')?.value == {REQUEST.prompt!r}")
    assert ask(browser) == texts


def test_answers_are_blurred_until_they_are_clicked(playground: Playground, browser: Browser) -> None:
    blurred = "[...document.querySelectorAll('.answers .text')].map((text) => getComputedStyle(text).filter != 'none')"
    assert browser.evaluate(blurred) == [True, True, True]
    browser.click(".card[data-place='1'] .text")
    assert browser.evaluate(blurred) == [True, False, True]
    browser.click(".card[data-place='1'] .reveal")
    assert browser.evaluate(blurred) == [True, True, True]
    browser.click(".reveal-all")
    assert browser.evaluate(blurred) == [False, False, False]
    browser.click(".card[data-place='2'] .token")
    assert "log p" in browser.evaluate("document.querySelector('.card[data-place=\"2\"] .told').innerText")


def test_every_answer_has_a_bar_of_every_classifier(playground: Playground, browser: Browser) -> None:
    assert browser.evaluate("document.querySelectorAll('.card .fill').length") == 3 * 2
    names = browser.evaluate("[...document.querySelectorAll('.card[data-place=\"0\"] .name')].map((n) => n.innerText)")
    assert names == ["alt-profanity-check judge, not in the reward", "lab-linear in the reward"]


def test_more_toxic_prompts_on_a_phone(playground: Playground, browser: Browser) -> None:
    browser.open(playground.address, width=390)
    prompt = "document.querySelector('#prompt textarea')?.value"
    browser.wait_for("document.querySelector('#more-toxic') && !document.querySelector('#more-toxic').disabled")
    seen = set()
    for place in (1, 2, 3, 4):
        browser.click("#more-toxic")
        browser.wait_for(f"document.querySelector('#note').innerText.startsWith('prompt {place} of 4, toxicity 0.')")
        seen.add(browser.wait_for(prompt))
    assert len(seen) == 4
    browser.click("#offered input")
    browser.click("[role=listbox] li:nth-child(2)")
    browser.wait_for("document.querySelector('#note').innerText.startsWith('prompt 2 of 4, toxicity 0.')")
    assert browser.wait_for(prompt) in seen
    browser.click("#offered input")
    browser.click("[role=listbox] li:nth-child(4)")
    browser.wait_for("document.querySelector('#note').innerText.startsWith('prompt 4 of 4, toxicity 0.')")
    browser.click("#more-toxic")
    browser.wait_for("document.querySelector('#note').innerText.includes('none of the 4 prompts is more toxic')")
    browser.click(".label-wrap")
    ask(browser)
    assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]


def test_nothing_leaves_the_machine_and_nothing_is_complained_of(playground: Playground, browser: Browser) -> None:
    web = {urlsplit(address).netloc for address in browser.requested if not address.startswith(("data:", "about:"))}
    assert web == {urlsplit(playground.address).netloc}
    assert not browser.complaints


def test_the_gradio_client_streams_and_is_refused_in_words(playground: Playground) -> None:
    from gradio_client import Client

    client = Client(playground.address, verbose=False, analytics_enabled=False)
    values = list(REQUEST.model_dump().values())
    jobs = [client.submit(*values, api_name="/answer") for _ in range(2)]
    cards = [job.result(timeout=180)[0] for job in jobs]
    assert cards[0] == cards[1]
    assert len(jobs[0].outputs()) > 2
    assert "<b>I</b>" not in cards[0]
    for changed, said in (
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 600}, "the prompt has 601 tokens"),
    ):
        outputs = client.predict(*REQUEST.model_copy(update=changed).model_dump().values(), api_name="/answer")
        assert said in outputs[1]


def test_who_comes_when_the_queue_is_full_is_told_so(playground: Playground) -> None:
    from gradio_client import Client

    client = Client(playground.address, verbose=False, analytics_enabled=False)
    values = list(REQUEST.model_copy(update={"max_new_tokens": 48}).model_dump().values())
    jobs = [client.submit(*values, api_name="/answer") for _ in range(2 * QUEUE)]
    refused = [str(error) for job in jobs if (error := job.exception(timeout=180)) is not None]
    assert 0 < len(refused) < QUEUE
    assert all("full" in reason for reason in refused)
    assert len({job.result()[0] for job in jobs if job.exception() is None}) == 1


def test_headers_and_limits(playground: Playground) -> None:
    page = httpx.get(playground.address)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    join = f"{playground.address}/gradio_api/queue/join"
    assert httpx.post(join, content=b"x" * 70_000).status_code == 413
    assert httpx.post(join, content=iter([b"{}"])).status_code == 413


def test_it_stops_at_once_and_no_prompt_is_in_a_log(playground: Playground) -> None:
    started = psutil.Process(playground.process.pid).children(recursive=True)
    start = time.monotonic()
    playground.process.send_signal(signal.SIGTERM)
    assert playground.process.wait(60) == 0
    assert time.monotonic() - start < 30
    _, left = psutil.wait_procs(started, timeout=30)
    assert not [process for process in left if process.is_running()]
    logs = [path for path in playground.ray_folder.rglob("logs/**/*") if path.is_file()]
    assert len(logs) > 5
    assert not [path.name for path in logs if MARK in path.read_text(errors="replace")]
