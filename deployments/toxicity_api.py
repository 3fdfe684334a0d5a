"""`serve run deployments.toxicity_api:app`: the scoring service on a Ray that Serve runs on.

The configuration is the YAML file given as `config=FILE`, or the tree that a deployment's file has there, or the file
named by DETOX_RAY_CONFIG, or the embedded one (configs/toxicity_api.yaml), which works offline. The file of a training
run will do: its classifiers are served.
"""

import os
from typing import Any

from ray import serve

from detox_ray.serving.api_config import load_api_config
from detox_ray.serving.http_api import build_http_app


def app(args: dict[str, Any]) -> serve.Application:
    """The application Serve builds; `args` may hold `config`, the path of a YAML file or what would stand in it.

    Serve builds it again when `args` change, so beside a path a `version` says that the file has changed.

    Raises:
        ConfigError, ModelError, DataError: the configuration or a classifier cannot be loaded.
    """
    return build_http_app(load_api_config(args.get("config") or os.environ.get("DETOX_RAY_CONFIG")))
