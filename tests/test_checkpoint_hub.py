"""Hub ids: fetched from a hub (a small one, on this machine), cached, and found again without network."""

from __future__ import annotations

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
from checkpoint_files import reference

from gptkern.tokenizer import Tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/gpt"
SCRIPT = """
import sys
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer
name, options = sys.argv[1], {"revision": sys.argv[2] or None, "local_files_only": sys.argv[3] == "local"}
try:
    model = GPT.from_pretrained(name, **options)
    tokenizer = Tokenizer.from_pretrained(name, **options)
    print("loaded", model.config.n_layer, model.tokenizer.encode("ab"), tokenizer.vocab_size)
except ValueError as error:
    print(f"{type(error).__name__}: {error}")
"""


class Hub(BaseHTTPRequestHandler):
    """The two parts of the hub's protocol that a download uses: a repository's listing, and its files."""

    folder: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.requests.append(self.path)
        path = self.path.split("?")[0]
        if path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            names = [{"rfilename": file.name} for file in self.folder.iterdir()]
            content = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": names}).encode()
        elif path.startswith(f"/{REPOSITORY}/resolve/main/") and (self.folder / Path(path).name).is_file():
            content = (self.folder / Path(path).name).read_bytes()
        else:
            self.send_response(404)
            revision = f"/api/models/{REPOSITORY}/" in path
            self.send_header("X-Error-Code", "RevisionNotFound" if revision else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{len(content)}-{Path(path).name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    Hub.folder, Hub.requests = tmp_path / "repository", []
    model = reference(vocab_size=300)
    model.save_pretrained(Hub.folder)
    Tokenizer.bytes().save(Hub.folder)
    (Hub.folder / "added_tokens.json").write_text("{}")
    (Hub.folder / "chat_template.jinja").write_text("{{ messages }}")
    (Hub.folder / "modeling_evil.py").write_text("never fetched")
    shutil.copy(Hub.folder / "model.safetensors", Hub.folder / "pytorch_model.bin")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(server: ThreadingHTTPServer, cache: Path, name: str, revision: str = "", local: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, revision, "local" if local else ""],
        env=os.environ
        | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hub(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = "loaded 2 [97, 98] 256"
    assert f"{REPOSITORY}: no such file or folder here" in load(hub, cache, REPOSITORY, local=True)
    assert not [path for path in Hub.requests if REPOSITORY in path]
    assert load(hub, cache, REPOSITORY) == expected
    # only what is needed: no second copy of the weights, no files that are not there
    assert not [path for path in Hub.requests if path.endswith((".bin", "vocab.json", ".index.json"))]
    fetched = {path.name for path in cache.glob("hub/models--*/snapshots/*/*")}
    assert fetched >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert fetched >= {"tokenizer_config.json", "added_tokens.json", "chat_template.jinja"}
    assert "modeling_evil.py" not in fetched
    Hub.requests.clear()
    assert load(hub, cache, REPOSITORY, local=True) == expected
    assert not [path for path in Hub.requests if REPOSITORY in path]
    assert "CheckpointError: someone/other: " in load(hub, cache, "someone/other")
    assert "hf download someone/gpt --revision v9" in load(hub, cache, REPOSITORY, revision="v9")
    hub.shutdown()
    hub.server_close()
    assert load(hub, cache, REPOSITORY) == expected
