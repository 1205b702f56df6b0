"""Ask the hub for models and data sets before ranks start, or find them in its caches."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import _find_hash_in_cache
from huggingface_hub import constants

from megalora.hf.hub import check_data_set, check_model, is_prepared
from tests.hub_cache import cache_model


class _Hub(http.server.BaseHTTPRequestHandler):
    """Has one data set and one model."""

    asked: list[str]

    def do_GET(self) -> None:
        # The package also asks for other things, once a day.
        if self.path.startswith(("/api/datasets/", "/api/models/")):
            self.asked.append(self.path)
        is_known = self.path in ("/api/datasets/me/chats", "/api/models/me/base")
        body = json.dumps({"id": self.path.partition("/me/")[2], "siblings": []}).encode()
        self.send_response(200 if is_known else 404)
        if not is_known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that answers here, with empty caches; the paths that it is asked for."""
    asked: list[str] = []
    handler = type("Hub", (_Hub,), {"asked": asked})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    yield asked
    server.shutdown()
    server.server_close()


def test_what_the_hub_has_passes_and_what_it_lacks_is_refused(hub: list[str]) -> None:
    check_data_set("me/chats", "data.train")
    check_model("me/base", "model.path")
    assert hub == ["/api/datasets/me/chats", "/api/models/me/base"]
    # A model is no data set, and the other way round.
    for check, name, what in ((check_data_set, "me/base", "a file here, and the hub does not give"
        " it (it has no such data set"), (check_model, "me/chats", "a folder here, and the hub does"
        " not give it (it has no such model")):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            check(name, "the.option")
        assert str(caught.value).startswith(f"the.option={name} is not {what}")
        assert "\n" not in str(caught.value)


def test_offline_only_caches_count(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="data.eval=me/chats is not a file here, .*offline mode"):
        check_data_set("me/chats", "data.eval")
    with pytest.raises(ValueError, match="model.path=me/base is not a folder here, .*offline mode"):
        check_model("me/base", "model.path")
    cache_model(tmp_path / "hub", "me/base")
    check_model("me/base", "model.path")
    assert hub == []


@pytest.mark.parametrize(
    "name", ["me/chats", "open-r1/OpenR1-Math-220k", "openai/GSM8K", "a.b/c_D"]
)
def test_a_prepared_data_set_is_found_where_datasets_finds_it(
    hub: list[str], tmp_path: Path, name: str
) -> None:
    assert not is_prepared(name)
    owner, _, own = name.partition("/")
    folder = tmp_path / "datasets" / f"{owner}___{camelcase_to_snakecase(own)}/main/0.0.0/0123"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"config_name": "main"}))
    found = _find_hash_in_cache(name, None, str(tmp_path / "datasets"), {}, None)
    assert found == ("main", "0.0.0", "0123")
    assert is_prepared(name)
    check_data_set(name, "data.train")
    assert not is_prepared(f"{name}x")
    assert hub == []
