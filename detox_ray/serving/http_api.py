"""The classifiers behind HTTP, in three formats; texts are never logged, stored or echoed."""

import logging
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from detox_ray.config import RewardConfig
from detox_ray.data.lab import resolve_lab
from detox_ray.rewards.ensemble import UNCALIBRATED, with_calibrations
from detox_ray.serving.api_config import ApiConfig, load_keys
from detox_ray.serving.api_errors import ApiError, api_of, error_response, from_validation
from detox_ray.serving.api_metrics import ApiMetrics
from detox_ray.serving.calibration_table import check_models, fitted_model
from detox_ray.serving.deploy import replica_runtime_env
from detox_ray.serving.docs_page import docs_page
from detox_ray.serving.moderations import UNSCORED_HEADER, moderations_router
from detox_ray.serving.perspective import perspective_router
from detox_ray.serving.readings import check_labels
from detox_ray.serving.request_gate import ApiKeys, RequestGate, key_digest
from detox_ray.serving.reward_app import build_reward_app
from detox_ray.serving.score_format import WINDOWS_HEADER, score_router
from detox_ray.serving.text_scorer import TextScorer

logger = logging.getLogger(__name__)

# What a request may take beyond the classifiers' time: reading, writing, waiting for a replica that was just lost.
GRACE_S = 5.0


@serve.ingress()
class ToxicityApi:
    """The HTTP side of the ensemble."""

    def __init__(
        self,
        ensemble: DeploymentHandle,
        config: ApiConfig,
        models: dict[str, dict[str, str]],
        key_digests: tuple[bytes, ...],
        release: str,
    ) -> None:
        self._ensemble = ensemble
        self._config = config
        self._models = models
        self._key_digests = key_digests
        self._release = release

    def __serve_build_asgi_app__(self) -> FastAPI:
        metrics = ApiMetrics(serve.get_replica_context().replica_id.unique_id)
        scorer = TextScorer(self._ensemble, self._config, metrics, self._release)
        return build_web_app(self._config, scorer, metrics, self._models, self._key_digests)


def build_web_app(
    config: ApiConfig,
    scorer: TextScorer,
    metrics: ApiMetrics,
    models: dict[str, dict[str, str]],
    key_digests: tuple[bytes, ...],
) -> FastAPI:
    """The routes of all three formats and of operations, behind the gate."""
    web = FastAPI(
        title="detox_ray toxicity API",
        description=_description(config),
        docs_url=None,
        redoc_url=None,
        # They would lead to http:// behind a proxy that speaks TLS.
        redirect_slashes=False,
    )
    web.include_router(score_router(config, scorer, models))
    web.include_router(perspective_router(config, scorer, metrics))
    web.include_router(moderations_router(config, scorer))

    # FastAPI documents GET and HEAD as two operations of one name; the routes without HEAD are for the documentation.
    @web.get("/healthz", tags=["operations"])
    @web.api_route("/healthz", methods=["GET", "HEAD"], include_in_schema=False)
    async def healthz() -> dict[str, str]:
        """200 while this replica takes requests."""
        return {"status": "ok"}

    @web.get("/readyz", tags=["operations"])
    @web.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
    async def readyz() -> Response:
        """200 while the classifiers answer."""
        ready = await scorer.is_ready()
        return JSONResponse({"status": "ready" if ready else "not ready"}, status_code=200 if ready else 503)

    @web.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counters in Prometheus' format."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @web.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return HTMLResponse(docs_page(web.openapi(), config.http.public_url or str(request.base_url)))

    _add_error_handlers(web, metrics)
    web.add_middleware(RequestGate, limits=config.limits, keys=ApiKeys(key_digests, config.keys), metrics=metrics)
    if config.http.cors_origins:
        web.add_middleware(
            CORSMiddleware,
            allow_origins=config.http.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", WINDOWS_HEADER, UNSCORED_HEADER],
        )
    return web


def _add_error_handlers(web: FastAPI, metrics: ApiMetrics) -> None:
    """Every error as JSON, in the format of the API that was called."""

    def refusal(request: Request, error: ApiError) -> JSONResponse:
        api = api_of(request.url.path.removeprefix(request.scope.get("root_path", "")))
        metrics.refused.labels(api, error.code).inc()
        return error_response(error, api)

    @web.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return refusal(request, error)

    @web.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        # Of a union pydantic reports every branch; the one it followed farthest is what was meant.
        return refusal(request, from_validation(max(error.errors(), key=lambda found: len(found["loc"]))))

    @web.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        code, message = {
            400: ("invalid_json", "the body is not JSON, or nested too deeply"),
            404: ("not_found", "there is no such path; /docs lists them"),
            405: ("method_not_allowed", "this path takes another method; /docs lists them"),
        }.get(error.status_code, ("refused", "the request was refused"))
        answer = refusal(request, ApiError(error.status_code, code, message))
        answer.headers.update(error.headers or {})  # 405: what is allowed
        return answer


def build_http_app(config: ApiConfig) -> serve.Application:
    """The classifiers with an HTTP ingress; members with `calibration: fit` are served uncalibrated.

    Raises:
        ConfigError, ModelError: a classifier cannot be loaded or has no such label or is not the one that the
            calibration was fitted for, or there are no keys where the configuration says so.
        DataError: the lab cannot be built.
    """
    config = _resolved(config)
    check_labels(config)
    digests = tuple(key_digest(key) for key in load_keys(config.keys))
    fitted_for = {c.name: fitted_model(c) for c in config.reward.classifiers}
    check_models(config.calibration, fitted_for)
    models = {name: {"model": found.model, "revision": found.revision} for name, found in fitted_for.items()}
    drain_s = config.limits.body_timeout_s + config.limits.timeout_s + GRACE_S
    deployment = serve.deployment(
        name="toxicity-api",
        num_replicas=config.http.replicas,
        # More than the gate admits, so that it is the gate that refuses, in the caller's format.
        max_ongoing_requests=4 * config.limits.requests,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0, "runtime_env": replica_runtime_env()},
    )
    scaling = {
        name: {
            "min_replicas": scale.min,
            "max_replicas": scale.max,
            "target_ongoing_requests": scale.target_ongoing_requests,
        }
        for name, scale in config.replicas.items()
    }
    release = uuid4().hex
    ensemble = build_reward_app(config.reward, scaling, drain_s, release)
    return deployment(ToxicityApi).bind(ensemble, config, models, digests, release)


def _resolved(config: ApiConfig) -> ApiConfig:
    """`config` with the lab's folders, calibrations, most replicas and our time limit in its reward section."""
    reward = config.reward
    unfitted = [c.name for c in reward.classifiers if c.calibration == "fit"]
    if unfitted:
        logger.warning("no calibration for %s: their scores are raw; use the config.yaml of a run", ", ".join(unfitted))
    tree = resolve_lab(with_calibrations(reward, dict.fromkeys(unfitted, UNCALIBRATED))).model_dump()
    for classifier in tree["classifiers"]:
        if classifier["name"] in config.replicas:
            classifier["replicas"] = config.replicas[classifier["name"]].max
        if classifier["perspective"] is not None:
            # The users' texts leave no trace on a disk, not even digests.
            classifier["perspective"]["cache"] = None
    # Later than the service's own limit, so that it is that one the answer names.
    tree |= {"text": "response", "timeout_s": config.limits.timeout_s + GRACE_S}
    return config.model_copy(update={"reward": RewardConfig.model_validate(tree)})


def _description(config: ApiConfig) -> str:
    limits, table = config.limits, config.calibration
    calibrated = ", ".join([*table.classifiers, *table.attributes, *table.categories]) or "none"
    return (
        f"Toxicity of texts by {', '.join(c.name for c in config.reward.classifiers)}. "
        f"A request holds at most {limits.request_bytes:,} bytes of JSON in UTF-8 and {limits.texts:,} texts of "
        f"{limits.characters:,} characters; longer texts than a classifier reads at once are read in overlapping "
        "windows, and the header X-Text-Windows says in how many. "
        f"Perspective attributes: {', '.join(config.attributes)}. "
        f"Categories of the moderations format: {', '.join(config.categories)}. "
        f"Probabilities fitted to labelled texts: {calibrated}. "
        "A refused request has a JSON error with a code, the field and the limit, in the format of the API called; "
        "429 comes with Retry-After. Texts are not logged and not stored."
    )
