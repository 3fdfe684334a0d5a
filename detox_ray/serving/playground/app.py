"""The playground as a Serve application: the page, the engine behind it, and the classifiers that score."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from detox_ray.config import RewardConfig
from detox_ray.serving.playground.setup import PageSetup

# Open pages hold a connection each.
CONNECTIONS = 1000
LARGEST_BODY_BYTES = 64 * 1024
HEADERS = {
    # Nothing is loaded from elsewhere, and nothing sent there, whatever a model writes.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@serve.ingress()
class PageDeployment:
    """The page; it answers at once, while engine and classifiers load."""

    def __init__(self, setup: PageSetup, engine: DeploymentHandle, scorers: DeploymentHandle) -> None:
        self._setup = setup
        self._engine = engine
        self._scorers = scorers

    def __serve_build_asgi_app__(self) -> ASGIApp:
        import gradio as gr

        from detox_ray.serving.playground.page import Page, page_head

        web = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        web.add_middleware(PageGuard)
        fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
        return gr.mount_gradio_app(
            web,
            Page(self._setup, self._engine, self._scorers).blocks(),
            path="/",
            theme=gr.themes.Base(primary_hue="teal", font=fonts, font_mono=["ui-monospace", "monospace"]),
            head=page_head(),
            footer_links=[],
            run_history=False,
            max_file_size=1,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )


class PageGuard:
    """Adds security headers to every response and refuses large bodies."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"")
        if scope["method"] == "POST" and (not length.isdigit() or int(length) > LARGEST_BODY_BYTES):
            await with_headers({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body", "body": b"too large, or of unknown length"})
            return
        await self._app(scope, receive, with_headers)


def build_playground(setup: PageSetup, engine_setup: Any, scorers: RewardConfig) -> serve.Application:
    """The application; `engine_setup` is an `EngineSetup`, `scorers` are the reward's classifiers and the judge.

    Raises:
        ConfigError, ModelError: a classifier cannot be loaded, as far as can be told before.
    """
    from detox_ray.serving.deploy import replica_runtime_env
    from detox_ray.serving.playground.engine import EngineDeployment
    from detox_ray.serving.reward_app import build_reward_app

    options: dict[str, Any] = {
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": 2,
        "graceful_shutdown_wait_loop_s": 0.2,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
    environment = {"num_cpus": 0, "runtime_env": replica_runtime_env()}
    engine = serve.deployment(
        name="engine",
        max_ongoing_requests=CONNECTIONS,
        max_constructor_retry_count=2,
        ray_actor_options={**environment, "num_gpus": int(engine_setup.gpu)},
        **options,
    )(EngineDeployment).bind(engine_setup)
    page = serve.deployment(name="page", max_ongoing_requests=CONNECTIONS, ray_actor_options=environment, **options)(
        PageDeployment
    )
    return page.bind(setup, engine, build_reward_app(scorers, drain_s=2))
