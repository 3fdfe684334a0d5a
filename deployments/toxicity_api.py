"""`serve run deployments.toxicity_api:app`: the scoring service on a Ray that Serve runs on.

The configuration is the YAML file given as `config=FILE`, or named by DETOX_RAY_CONFIG, or the embedded one
(configs/toxicity_api.yaml), which works offline. The file of a training run will do: its classifiers are served.
"""

import os

from ray import serve

from detox_ray.serving.api_config import load_api_config
from detox_ray.serving.http_api import build_http_app


def app(args: dict[str, str]) -> serve.Application:
    """The application Serve builds; `args` may hold `config`, the path of a YAML file, and for Serve its `version`.

    Raises:
        ConfigError, ModelError, DataError: the configuration or a classifier cannot be loaded.
    """
    return build_http_app(load_api_config(args.get("config") or os.environ.get("DETOX_RAY_CONFIG")))
