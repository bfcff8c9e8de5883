"""ServeSettings: what an operator chooses, checked."""

from __future__ import annotations

import math
import re
import ssl
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

# A key goes into a header of ASCII characters.
_KEY = re.compile(r"[!-~]{8,}")
LONGEST_STEERING_NAME = 64


# The panels of ``gptkern serve --help``.
_LIMITS, _STREAMS, _ACCESS = "Limits", "Streams", "Access"


def _setting(default: Any, help_: str, *, panel: str | None = None, least: float | None = None) -> Any:
    """A field of ``ServeSettings``: described here for the command line and for the checks."""
    return field(default=default, metadata={"help": help_, "panel": panel, "least": least})


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of a server.

    What each means stands beside its default. ``deadline=None`` is none.

    Raises:
        TypeError, ValueError: A setting of the wrong type or out of range.
    """

    model_name: str = _setting("gptkern", "The model's name in requests and answers.")
    host: str = _setting("127.0.0.1", "The address to listen at; 0.0.0.0 lets other machines in.")
    port: int = _setting(8000, "The port; 0 takes a free one.", least=0)
    most_rows: int = _setting(
        512,
        "Most continuations that are admitted at once, waiting ones included; beyond it 429.",
        panel=_LIMITS,
        least=1,
    )
    most_tokens: int = _setting(
        1 << 20,
        "Most tokens, prompts and new ones, that these come to; beyond it 429.",
        panel=_LIMITS,
        least=1,
    )
    deadline: float | None = _setting(
        600.0, "Seconds after which a request ends with what it has.", panel=_LIMITS, least=1e-3
    )
    body_bytes: int = _setting(4 << 20, "Most bytes of a request's body.", panel=_LIMITS, least=1)
    grammar_seconds: float = _setting(
        5.0, "Most seconds that a grammar takes to compile.", panel=_LIMITS, least=1e-3
    )
    drain: float = _setting(
        30.0, "Seconds that requests in flight have after SIGTERM.", panel=_LIMITS, least=0
    )
    stream_interval: float = _setting(
        0.04,
        "Fewest seconds between two chunks of a stream; tokens of the time between share one.",
        panel=_STREAMS,
        least=0,
    )
    stream_tokens: int = _setting(32, "Tokens that make a chunk before that time.", panel=_STREAMS, least=1)
    api_keys: tuple[str, ...] = _setting(
        (), "Keys of which a request must present one; with none, nobody is asked.", panel=_ACCESS
    )
    cors_origins: tuple[str, ...] = _setting((), "Origins whose pages may ask, * for any.", panel=_ACCESS)
    tls_certificate: str | None = _setting(None, "The certificate, as PEM.", panel=_ACCESS)
    tls_key: str | None = _setting(None, "Its key, as PEM.", panel=_ACCESS)
    chat_template: str | None = _setting(None, "A Jinja chat template in place of the model's own.")
    steering: tuple[str, ...] = _setting(
        (),
        "Steering vectors under a name: NAME=FILE.safetensors, whose tensors are named by layer. The model's "
        "layers then run all requests one by one.",
    )
    access_log: bool = _setting(True, "Write a line of JSON a request to standard error.")

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.metadata["least"] is not None:
                _check_number(one, getattr(self, one.name))
        if self.port > 65535:
            raise ValueError(f"ServeSettings: port is {self.port}; 0 to 65535 is accepted")
        if not self.model_name:
            raise ValueError("ServeSettings: model_name is empty; a name is needed")
        _check_steering(self.steering)
        _check_tls(self.tls_certificate, self.tls_key)
        if any(not _KEY.fullmatch(key) for key in self.api_keys):
            # The key itself is no part of the message.
            raise ValueError(
                "ServeSettings: an API key is shorter than 8 characters, or holds spaces or characters "
                "beyond ASCII; 8 or more printable ASCII characters are needed"
            )


def _check_steering(registered: tuple[str, ...]) -> None:
    names = set()
    for entry in registered:
        name, is_pair, file = entry.partition("=")
        if not is_pair or not file or not 0 < len(name) <= LONGEST_STEERING_NAME:
            raise ValueError(
                f"ServeSettings: steering is {entry!r}; NAME=FILE, with a name of 1 to "
                f"{LONGEST_STEERING_NAME} characters, is needed"
            )
        if name in names:
            raise ValueError(f"ServeSettings: steering has {name!r} twice; each name once is needed")
        names.add(name)


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


def _check_number(setting: Field[Any], value: object) -> None:
    name, least = setting.name, setting.metadata["least"]
    if value is None and name == "deadline":
        return
    whole = setting.type == "int"
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
        kind = "a whole number" if whole else "a number"
        raise TypeError(f"ServeSettings: {name} is {value!r}; {kind} is needed")
    assert isinstance(value, int | float)
    if not least <= value < math.inf:
        raise ValueError(f"ServeSettings: {name} is {value}; {least:g} or more is needed")
