"""ServeSettings: what an operator chooses, checked."""

from __future__ import annotations

import math
import re
import ssl
from dataclasses import dataclass, fields
from pathlib import Path

# A key goes into a header of ASCII characters.
_KEY = re.compile(r"[!-~]{8,}")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of a server.

    Attributes:
        model_name: The name by which requests and answers call the model.
        host, port: The address that it listens at; port 0 takes a free one.
        most_rows: Continuations that may be admitted at once, those that wait included.
        most_tokens: Tokens, of prompts and new ones, that the admitted ones may come to together.
        deadline: Seconds after which a request ends with what it has; None: no end.
        drain: Seconds that requests in flight have after SIGTERM.
        body_bytes: Bytes of a request's body.
        stream_interval: Seconds between two chunks of a stream, at least, unless ``stream_tokens`` have come.
        stream_tokens: Tokens that make a chunk at once.
        grammar_seconds: Seconds that a grammar may take to be compiled.
        api_keys: Keys of which a request must present one; empty: none is needed.
        cors_origins: Origins whose pages may ask, ``"*"`` for any.
        tls_certificate, tls_key: Files of PEM; both or none.
        chat_template: A Jinja template in place of the model's own.
        access_log: One line of JSON a request on standard error.

    Raises:
        TypeError, ValueError: A setting of the wrong type or out of range.
    """

    model_name: str = "gptkern"
    host: str = "127.0.0.1"
    port: int = 8000
    most_rows: int = 512
    most_tokens: int = 1 << 20
    deadline: float | None = 600.0
    drain: float = 30.0
    body_bytes: int = 4 << 20
    stream_interval: float = 0.04
    stream_tokens: int = 32
    grammar_seconds: float = 5.0
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    tls_certificate: str | None = None
    tls_key: str | None = None
    chat_template: str | None = None
    access_log: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _LEAST:
                _check_number(field.name, value, whole=field.type == "int")
        if self.port > 65535:
            raise ValueError(f"ServeSettings: port is {self.port}; 0 to 65535 is accepted")
        if not self.model_name:
            raise ValueError("ServeSettings: model_name is empty; a name is needed")
        _check_tls(self.tls_certificate, self.tls_key)
        if any(not _KEY.fullmatch(key) for key in self.api_keys):
            # The key itself is no part of the message.
            raise ValueError(
                "ServeSettings: an API key is shorter than 8 characters, or holds spaces or characters "
                "beyond ASCII; 8 or more printable ASCII characters are needed"
            )


def _check_tls(certificate: str | None, key: str | None) -> None:
    """Refuse files that cannot be served with: otherwise the model would be loaded first."""
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise ValueError("ServeSettings: tls_certificate and tls_key belong together: give both or none")
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"ServeSettings: {name} is {path!r}, which cannot be read: {error}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(certificate)
    except ssl.SSLError as error:
        raise ValueError(
            f"ServeSettings: tls_certificate is {certificate!r}; a certificate in PEM is needed"
        ) from error
    try:
        # A key with a password would be asked for at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"ServeSettings: tls_key is {key!r}; the key of {certificate!r} is needed, in PEM and without a "
            "password"
        ) from error


_LEAST: dict[str, float] = {
    "port": 0,
    "most_rows": 1,
    "most_tokens": 1,
    "deadline": 1e-3,
    "drain": 0,
    "body_bytes": 1,
    "stream_interval": 0,
    "stream_tokens": 1,
    "grammar_seconds": 1e-3,
}


def _check_number(name: str, value: object, *, whole: bool) -> None:
    if value is None and name == "deadline":
        return
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
        kind = "a whole number" if whole else "a number"
        raise TypeError(f"ServeSettings: {name} is {value!r}; {kind} is needed")
    assert isinstance(value, int | float)
    if not _LEAST[name] <= value < math.inf:
        raise ValueError(f"ServeSettings: {name} is {value}; {_LEAST[name]:g} or more is needed")
