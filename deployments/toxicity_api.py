"""`serve run deployments.toxicity_api:app`: the reward ensemble of a configuration behind HTTP.

The configuration is the YAML file given as `config=FILE`, or named by DETOX_RAY_CONFIG, or configs/laptop.yaml.
"""

import os

from ray import serve

from detox_ray.config import load_config
from detox_ray.serving.http_api import build_http_app


def app(args: dict[str, str]) -> serve.Application:
    """The application Serve builds; `args` may hold `config`, the path of a YAML file.

    Raises:
        ConfigError, ModelError: the configuration or a classifier cannot be loaded.
    """
    # The lab trains models: only those who serve it pay for the import.
    from detox_ray.data.lab import resolve_lab

    path = args.get("config") or os.environ.get("DETOX_RAY_CONFIG") or "configs/laptop.yaml"
    return build_http_app(resolve_lab(load_config(path)).reward)
