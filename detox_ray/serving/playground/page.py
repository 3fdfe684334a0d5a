"""The page: prompt, settings and the answers of all systems side by side."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import escape
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from detox_ray.errors import ConfigError
from detox_ray.serving.playground.answers import Answer, extended, scored, texts_to_score
from detox_ray.serving.playground.cards import TEMPLATES, State, cards
from detox_ray.serving.playground.prompts import PromptShelf
from detox_ray.serving.playground.request import (
    LARGEST_SEED,
    LONGEST_ANSWER_TOKENS,
    LONGEST_PROMPT_CHARACTERS,
    AnswerRequest,
    answer_request,
    from_permalink,
    to_permalink,
)
from detox_ray.serving.playground.setup import PageSetup

logger = logging.getLogger(__name__)

# Requests that wait for the engine; beyond that the page asks to come back later.
QUEUE = 16
# Cards are drawn again no more often than this.
REDRAW_S = 0.1
RETRY_S = 2.0
# Prompts the judge reads at once: a slow one gets through these within the time limit of a call.
PROMPTS_A_CALL = 32
LABEL_CHARACTERS = 80

COPY_LINK = """async () => {
  try { await navigator.clipboard.writeText(location.href); }
  catch { prompt("Copy this link:", location.href); }
}"""
SHOW_LINK = "(fragment) => { history.replaceState(null, '', '#' + fragment); }"
READ_LINK = "() => [location.hash]"


class Page:
    """The events of the page; the models are behind two handles, which answer once they are loaded."""

    def __init__(self, setup: PageSetup, engine: DeploymentHandle, scorers: DeploymentHandle) -> None:
        self._setup = setup
        self._engine = engine
        self._scorers = scorers
        self._shelf = PromptShelf(setup.prompts)
        self._loading = {"the model", "the classifiers"}
        self._trouble = ""
        self._start: asyncio.Task[Any] | None = None

    async def status(self) -> tuple[Any, ...]:
        """What is still loading, whether one may ask, the prompts on offer, and whether to look again."""
        if self._start is None:
            self._start = asyncio.create_task(self._wait_until_loaded())
        notice = f"loading {' and '.join(sorted(self._loading, reverse=True))} …{self._trouble}"
        return (
            gr.update(
                value=f'<div class="pg"><p class="notice loading">{notice}</p></div>', visible=bool(self._loading)
            ),
            gr.update(interactive="the model" not in self._loading),
            gr.skip() if "the classifiers" in self._loading else gr.update(choices=self._choices()),
            gr.update(interactive="the classifiers" not in self._loading),
            gr.update(active=bool(self._loading)),
        )

    async def _wait_until_loaded(self) -> None:
        await asyncio.gather(self._wait_for_engine(), self._wait_for_scorers())

    async def _wait_for_engine(self) -> None:
        probe = AnswerRequest(prompt="hello", temperature=1, top_p=1, max_new_tokens=1, seed=0)
        while True:
            try:
                await self._engine.refusal.remote(probe)
                self._loading.discard("the model")
                return
            except (RayError, RayServeException) as error:
                await self._retry_later("the engine", error)

    async def _wait_for_scorers(self) -> None:
        """Until the classifiers answer, and the judge has read the prompts whose file has no toxicity."""
        unscored = self._shelf.unscored()
        toxicity: list[float] = []
        for start in range(0, max(1, len(unscored)), PROMPTS_A_CALL):
            toxicity += await self._judged(unscored[start : start + PROMPTS_A_CALL] or ["hello"])
        self._shelf = self._shelf.scored(toxicity)
        self._loading.discard("the classifiers")

    async def _judged(self, texts: list[str]) -> list[float]:
        """The judge's toxicity of each text, whenever it answers."""
        while True:
            try:
                return (await self._scorers.toxicity.remote(texts))[self._setup.judge].tolist()
            except (RayError, RayServeException) as error:
                await self._retry_later("a classifier", error)

    async def _retry_later(self, part: str, error: Exception) -> None:
        # The message of the error may quote a text.
        logger.error("%s does not answer: %s", part, type(error).__name__)
        self._trouble = f" ({part} failed and is asked again; its log says why)"
        await asyncio.sleep(RETRY_S)

    async def answer(
        self, prompt: str, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Cards, note and permalink, again and again while the answers grow."""
        try:
            request = answer_request(
                prompt=prompt, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
            )
            if (refusal := await self._engine.refusal.remote(request)) is not None:
                raise ConfigError(refusal)
        except ConfigError as error:
            yield gr.skip(), note(str(error)), gr.skip()
            return
        link = to_permalink(request)
        answers = [Answer() for _ in self._setup.systems]
        yield self._cards(answers, "answering"), note(""), link
        response: Any = self._engine.options(stream=True).answer.remote(request)
        drawn = time.monotonic()
        try:
            async for step in response:
                answers = extended(answers, step)
                if time.monotonic() - drawn > REDRAW_S:
                    yield self._cards(answers, "answering"), gr.skip(), gr.skip()
                    drawn = time.monotonic()
        except (RayError, RayServeException) as error:
            logger.error("answering failed: %s", type(error).__name__)
            yield self._cards(answers, "done"), note("the engine failed; ask again, or look in its log"), gr.skip()
            return
        finally:
            response.cancel()
        yield self._cards(answers, "scoring"), gr.skip(), gr.skip()
        yield await self._scored_cards(answers), gr.skip(), gr.skip()

    async def _scored_cards(self, answers: list[Answer]) -> str:
        texts = texts_to_score(answers)
        if not texts:
            return self._cards(answers, "done")
        try:
            toxicity = await self._scorers.toxicity.remote(texts)
        except (RayError, RayServeException) as error:
            # Its message may quote a text.
            logger.error("scoring failed: %s", type(error).__name__)
            return self._cards(answers, "done", "a classifier does not answer")
        return self._cards(scored(answers, {name: values.tolist() for name, values in toxicity.items()}), "done")

    async def more_toxic(self, prompt: str) -> tuple[Any, ...]:
        """A prompt more toxic than this one, and a note on where it stands."""
        toxicity = 0.0
        if prompt.strip() and self._shelf.place(prompt) is None:
            try:
                read = await self._scorers.toxicity.remote([prompt[:LONGEST_PROMPT_CHARACTERS]])
            except (RayError, RayServeException) as error:
                logger.error("scoring a prompt failed: %s", type(error).__name__)
                return gr.skip(), note("the judge does not answer; try again")
            toxicity = float(read[self._setup.judge][0])
        place = self._shelf.more_toxic(prompt, toxicity)
        if place is None:
            return gr.skip(), note(f"none of the {len(self._shelf.prompts)} prompts is more toxic than this one")
        return self.pick(place)

    def pick(self, place: int | None) -> tuple[Any, ...]:
        """The prompt that stands there, and a note on how toxic it is."""
        if place is None:
            return gr.skip(), gr.skip()
        prompt = self._shelf.prompts[place]
        toxicity = "" if prompt.toxicity is None else f", toxicity {prompt.toxicity:.2f}"
        return prompt.text, note(f"prompt {place + 1} of {len(self._shelf.prompts)}{toxicity}")

    def link(self, prompt: str, temperature: float, top_p: float, max_new_tokens: int, seed: int) -> tuple[Any, ...]:
        """The permalink of what stands in the form, and a note."""
        try:
            request = answer_request(
                prompt=prompt, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
            )
        except ConfigError as error:
            return gr.skip(), note(str(error))
        return to_permalink(request), note("the link is in the address bar, and copied where the browser allows it")

    def opened(self, fragment: str) -> tuple[Any, ...]:
        """The form and a note, filled from the permalink that was opened."""
        try:
            request = from_permalink(fragment or "")
        except ConfigError as error:
            return (*[gr.skip()] * 5, note(f"this link is no permalink of the playground: {error}"))
        if request is None:
            return (*[gr.skip()] * 6,)
        return (*request.model_dump().values(), note("from the link: press Answer for the same answers again"))

    def _choices(self) -> list[tuple[str, int]]:
        return [
            (f"{'' if p.toxicity is None else f'{p.toxicity:.2f}  '}{p.text[:LABEL_CHARACTERS]}", place)
            for place, p in enumerate(self._shelf.prompts)
        ]

    def _cards(self, answers: list[Answer], state: State, problem: str = "") -> str:
        return cards(self._setup.systems, self._setup.scorers, answers, state, problem)

    def blocks(self) -> gr.Blocks:
        """The layout, with every event attached."""
        setup = self._setup
        with gr.Blocks(title=setup.title, analytics_enabled=False) as blocks:
            html: dict[str, Any] = {"apply_default_css": False, "js_on_load": None}
            gr.HTML(TEMPLATES.get_template("header.html.jinja").render(setup=setup), **html)
            status = gr.HTML(visible=False, **html)
            prompt = gr.Textbox(
                label="Prompt", lines=2, max_lines=6, max_length=LONGEST_PROMPT_CHARACTERS, elem_id="prompt",
                placeholder="Type how a text begins, or pick a prompt",
            )  # fmt: skip
            with gr.Row():
                offered = gr.Dropdown(
                    label="Pick a prompt", choices=self._choices(), value=None, elem_id="offered", min_width=260
                )
                more_toxic = gr.Button("A more toxic prompt", elem_id="more-toxic", interactive=False, min_width=150)
            with gr.Accordion("Sampling", open=False):
                with gr.Row():
                    temperature = gr.Slider(0, 2, setup.temperature, step=0.05, label="Temperature", min_width=230)
                    top_p = gr.Slider(0.05, 1, setup.top_p, step=0.05, label="Top-p", min_width=230)
                    tokens = gr.Slider(
                        1, LONGEST_ANSWER_TOKENS, setup.max_new_tokens, step=1, label="Tokens", min_width=230
                    )
                seed = gr.Number(
                    0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed",
                    info="All systems get the same random numbers, so that they part only where they differ.",
                )  # fmt: skip
            with gr.Row():
                ask = gr.Button("Answer", variant="primary", elem_id="ask", interactive=False, scale=3, min_width=260)
                new_seed = gr.Button("New seed", elem_id="new-seed", min_width=96)
                copy_link = gr.Button("Copy link", elem_id="copy-link", min_width=96)
                stop = gr.Button("Stop", elem_id="stop", min_width=70)
            notes = gr.HTML(elem_id="note", **html)
            answers = gr.HTML(self._cards([Answer() for _ in setup.systems], "waiting"), elem_id="answers", **html)
            fragment = gr.Textbox(visible="hidden")
            timer = gr.Timer(1.0)

            form: list[Any] = [prompt, temperature, top_p, tokens, seed]
            quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            asked = ask.click(
                self.answer, form, [answers, notes, fragment],
                api_name="answer", show_progress="minimal", show_progress_on=notes,
            )  # fmt: skip
            stop.click(lambda: note("stopped"), None, notes, cancels=[asked], **quiet)
            copy_link.click(self.link, form, [fragment, notes], **quiet).then(None, js=COPY_LINK)
            fragment.change(None, fragment, js=SHOW_LINK)
            more_toxic.click(self.more_toxic, prompt, [prompt, notes], **quiet)
            offered.input(self.pick, offered, [prompt, notes], **quiet)
            new_seed.click(lambda: secrets.randbelow(LARGEST_SEED + 1), None, seed, **quiet)
            loaded: list[Any] = [status, ask, offered, more_toxic, timer]
            timer.tick(self.status, None, loaded, **quiet)
            blocks.load(self.status, None, loaded, **quiet)
            blocks.load(self.opened, fragment, [*form, notes], js=READ_LINK, **quiet)
        return blocks.queue(max_size=QUEUE, default_concurrency_limit=1)


def note(text: str) -> str:
    """A line below the buttons."""
    return f'<p class="pg soft">{escape(text)}</p>' if text else ""


def page_head() -> str:
    """Style and script of the page, for its `<head>`."""
    folder = Path(__file__).parent
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return f"<style>{style}</style><script>{script}</script>"
