"""The HTTP server: OpenAI's interface in front of one engine.

::

    settings = gptkern.serve.ServeSettings(port=8000)
    gptkern.serve.run(gptkern.GPT.from_pretrained(), settings)

``create_app`` gives the ASGI application, for a server or a test of your own.
"""

from typing import TYPE_CHECKING

from gptkern._lazy import lazily

if TYPE_CHECKING:
    from gptkern.serve.app import create_app
    from gptkern.serve.process import run
    from gptkern.serve.settings import ServeSettings

_HOMES = {
    "ServeSettings": "gptkern.serve.settings",
    "create_app": "gptkern.serve.app",
    "run": "gptkern.serve.process",
}

__all__ = ["ServeSettings", "create_app", "run"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
