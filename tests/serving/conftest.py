import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "rewards"))


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_classifier import save_tiny_classifier

    return save_tiny_classifier(tmp_path_factory.mktemp("tiny"))
