"""The server behind a certificate that the test makes; files that are no certificate or no key of it."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from serve_support import NAME, serving, small_model

from gptkern.serve.settings import ServeSettings

if shutil.which("openssl") is None:
    pytest.skip("needs openssl, to make certificates", allow_module_level=True)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a certificate for 127.0.0.1 with its key, that key under a password, and another key."""
    folder = tmp_path_factory.mktemp("tls")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    names = ("-subj", "/CN=gptkern", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1")
    for name in ("own", "other"):
        out = ("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem")
        _openssl("req", "-x509", *curve, *names, *out)
    locked = ("-aes128", "-passout", "pass:secret")
    _openssl("ec", "-in", folder / "own.key", "-out", folder / "locked.key", *locked)
    (folder / "text").write_text("no certificate")
    return folder


def _settings(files: Path, certificate: str, key: str) -> dict[str, Any]:
    return {"tls_certificate": str(files / certificate), "tls_key": str(files / key)}


def test_answers_over_tls(files: Path) -> None:
    trusting = ssl.create_default_context(cafile=files / "own.pem")
    with serving(small_model(), **_settings(files, "own.pem", "own.key")) as server:
        assert server.url.startswith("https://")
        body = {"model": NAME, "prompt": "ab", "max_tokens": 30, "seed": 1}
        with httpx.Client(verify=trusting, base_url=server.url) as client:
            whole = client.post("/v1/completions", json=body).json()
            streamed = client.post("/v1/completions", json=body | {"stream": True}).text
        assert whole["usage"]["completion_tokens"] == 30 and streamed.endswith("data: [DONE]\n\n")
        openai = pytest.importorskip("openai", reason="needs the openai client")
        with httpx.Client(verify=trusting) as transport:
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", http_client=transport)
            found = client.completions.create(**body)
        assert found.choices[0].text == whole["choices"][0]["text"]
        # Who does not know the certificate, or speaks without one, gets nothing.
        for url in (server.url, server.url.replace("https", "http")):
            with pytest.raises(httpx.TransportError):
                httpx.get(url + "/health")
        assert server.is_idle()


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        ("none.pem", "own.key", "tls_certificate is .*none.pem.*No such file"),
        ("own.pem", "none.key", "tls_key is .*none.key.*No such file"),
        ("text", "own.key", "tls_certificate is .*text'; a certificate in PEM"),
        ("own.pem", "text", "tls_key is .*text'; the key of"),
        ("own.pem", "other.key", "tls_key is .*other.key'; the key of .*own.pem"),
        ("own.pem", "locked.key", "tls_key is .*locked.key'.* without a password"),
        ("own.pem", ".", "tls_key is .* cannot be read"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(
    files: Path, certificate: str, key: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ServeSettings(**_settings(files, certificate, key))


def test_one_file_alone_is_refused(files: Path) -> None:
    with pytest.raises(ValueError, match="belong together"):
        ServeSettings(tls_certificate=str(files / "own.pem"))
