"""What a hub is asked for, with which token, and what is said where it does not give it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from hub_loads import load_all
from hub_server import HubServer, commit
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.e2e
TOKEN = "hf_of_a_test"
PINNED = ["x/model@v1", "x/classifier@v1", "x/prompts@v1"]
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Repositories: name -> revision -> folder; whatever can be loaded differs between the revisions."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
    from tiny_classifier import save_tiny_classifier

    root = tmp_path_factory.mktemp("hub")
    models = {revision: copytree(tiny_model, root / "model" / revision) for revision in ("main", "v1")}
    weights = load_file(models["v1"] / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, models["v1"] / "model.safetensors", {"format": "pt"})
    for file, update in {
        "config.json": {"max_position_embeddings": 400},
        "generation_config.json": {"eos_token_id": [0, 7]},
        "tokenizer_config.json": {"model_max_length": 333},
    }.items():
        path = models["v1"] / file
        path.write_text(json.dumps(json.loads(path.read_text()) | update))
    pickled = copytree(tiny_model, root / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    prompts = {revision: root / "prompts" / revision for revision in ("main", "v1")}
    for revision, folder in prompts.items():
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text(json.dumps({"prompt": f"of {revision}"}))
    classifiers = {r: save_tiny_classifier(root / "classifier" / r, toxic=t) for r, t in (("main", 0), ("v1", 1))}
    return {
        "x/model": models,
        "x/classifier": classifiers,
        "x/prompts": prompts,
        "x/private": {"main": models["main"]},
        "x/gated": {"main": models["main"]},
        "x/gated-prompts": {"main": prompts["main"]},
        "x/pickled": {"v1": pickled},
    }


@pytest.fixture(scope="module")
def hub(folders: dict[str, dict[str, Path]]) -> Iterator[HubServer]:
    server = HubServer(folders, TOKEN, private={"x/private"}, gated={"x/gated", "x/gated-prompts"})
    yield server
    server.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub: HubServer, home: Path) -> Found:
    """What a process with a token and an empty cache gets."""
    refused = ["x/model@v9", "x/gated", "x/gated-prompts", "x/missing", "x/missing-prompts", "x/pickled@v1"]
    return loaded(home, [*PINNED, "x/model", "x/private", *refused], HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)


def loaded(home: Path, targets: list[str], **environment: str) -> Found:
    """What `hub_loads.py` gets in a process of its own."""
    scratch = home / f"scratch-{len(list(home.glob('scratch-*')))}"
    command = [sys.executable, str(Path(__file__).with_name("hub_loads.py")), str(scratch), *targets]
    given = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    run = subprocess.run(command, env=given | {"HF_HOME": str(home)}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_everything_is_of_the_pinned_revision(
    online: Found, folders: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    for name in ("x/model", "x/classifier"):
        of_folder = load_all([str(folders[name]["v1"])], tmp_path / name)[str(folders[name]["v1"])]
        assert online[f"{name}@v1"] == json.loads(json.dumps(of_folder))
    assert online["x/prompts@v1"] == {"prompts": ["of v1"]}
    same = {what for what, found in online["x/model"].items() if found == online["x/model@v1"][what]}
    assert same == set()


def test_the_hub_was_asked_for_the_pinned_revision_alone_with_the_token(online: Found, hub: HubServer) -> None:
    asked = [request for request in hub.requests if "x/classifier" in request.path or "x/prompts" in request.path]
    files = [request.path for request in asked if "/resolve/" in request.path]
    assert len(files) > 5
    for path in files:
        name, _, wanted = path.strip("/").partition("/resolve/")
        assert wanted.split("/")[0] in ("v1", commit(name.removeprefix("datasets/"), "v1"))
    assert {request.token for request in asked} == {TOKEN}


def test_a_private_model_is_had_with_the_token(online: Found) -> None:
    assert online["x/private"]["base"] == online["x/model"]["base"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("x/model@v9", "the hub has no such revision of it; name a commit, tag or branch"),
        ("x/gated", "it is gated: accept its terms at http://127.0.0.1:"),
        ("x/gated-prompts", "it is gated: accept its terms at http://127.0.0.1:"),
        ("x/missing", "the hub shows none of that name; check it, or set HF_TOKEN"),
        ("x/missing-prompts", "the hub shows none of that name; check it, or set HF_TOKEN"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line_with_the_fix(online: Found, target: str, said: str) -> None:
    for what, found in online[target].items():
        assert said in found, what
        assert "\n" not in found
        assert target.partition("@")[0] in found


def test_weights_that_are_no_safetensors(online: Found) -> None:
    assert "it has no safetensors weights, and others are not read" in online["x/pickled@v1"]["base"]
    assert "no safetensors" in online["x/pickled@v1"]["reference"]


def test_offline_the_cache_serves_the_pinned_revision_and_nothing_else(
    online: Found, hub: HubServer, home: Path
) -> None:
    asked = len(hub.requests)
    targets = [*PINNED, "x/model", "x/missing", "x/prompts@v9"]
    offline = loaded(home, targets, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == asked
    for target in (*PINNED, "x/model"):
        assert offline[target] == online[target]
    for found in (*offline["x/missing"].values(), offline["x/prompts@v9"]["prompts"]):
        assert "HF_HUB_OFFLINE is set" in found
        assert "load it once without HF_HUB_OFFLINE" in found
