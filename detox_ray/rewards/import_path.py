"""`package.module:name`, the way a configuration names an object of the user's own."""

import importlib
from typing import Any

from detox_ray.errors import ConfigError, first_line


def imported(path: str, where: str) -> Any:
    """The object at `package.module:name`; `where` begins the message of an error.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {path!r} cannot be imported: {first_line(error)}; give package.module:function of a package "
            "that is installed"
        ) from None
