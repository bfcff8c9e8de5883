"""The playground in headless Chromium: type, stream, stop, hover; light, dark and narrow."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from chromium import PROGRAM, Page, chromium
from serve_support import Running, serving

from gptkern import GPT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="needs chromium"),
]
# Where pictures of the page go, for eyes.
PICTURES = os.environ.get("GPTKERN_TEST_PICTURES")
IDLE = "document.querySelector('#output').getAttribute('aria-busy') === 'false'"
TOKENS = "document.querySelectorAll('#output .token').length"
TEXT = "document.querySelector('#output').textContent"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(GPT.from_pretrained()) as running:
        yield running


@pytest.fixture
def page(server: Running, tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path / "profile") as page:
        page.look()
        page.go(server.url + "/")
        page.until("document.querySelector('#model').textContent.includes('context')")
        yield page
        assert page.problems == []


def test_what_is_typed_is_continued_as_it_comes(server: Running, page: Page) -> None:
    page.type("#prompt", "JULIET:\nO Romeo")
    page.type("#seed", "7")
    page.type("#max_tokens", "60")
    page.evaluate(
        "window.sizes = new Set(); new MutationObserver(() => sizes.add(document.querySelectorAll("
        "'#output .token').length)).observe(document.querySelector('#output'), {childList: true})"
    )
    page.evaluate("document.querySelector('#prompt').focus()")
    page.press("Enter", modifiers=2)
    page.until(f"{IDLE} && {TOKENS} > 0")
    asked: dict[str, Any] = {"seed": 7, "max_tokens": 60, "temperature": 0.8}
    expected = server.complete("JULIET:\nO Romeo", **asked)["choices"][0]["text"]
    assert page.evaluate(TEXT) == "JULIET:\nO Romeo" + expected
    assert page.evaluate("sizes.size") > 1
    assert page.evaluate("document.querySelector('#speed').textContent").startswith("60 tokens, ")


def test_the_stop_button_ends_the_request_on_the_server(server: Running, page: Page) -> None:
    inner = server.service.inner
    step, pause = inner.step, threading.Event()

    def slow_step() -> Any:
        pause.wait(0.02)
        return step()

    inner.step = slow_step  # type: ignore[method-assign]
    try:
        page.type("#max_tokens", "400")
        page.click("#generate")
        page.until(f"{TOKENS} > 3")
        page.click("#stop")
        page.until(IDLE)
        end = time.monotonic() + 60
        while not server.is_idle():
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        inner.step = step  # type: ignore[method-assign]
    assert 3 < page.evaluate(TOKENS) < 400
    assert page.evaluate("document.querySelector('#error').hidden")
    assert page.evaluate("document.querySelector('#stop').disabled")


def test_alternatives_stand_under_the_pointer_and_the_arrow_keys(page: Page) -> None:
    page.type("#max_tokens", "20")
    page.click("#generate")
    page.until(f"{IDLE} && {TOKENS} >= 15")
    assert page.evaluate("document.querySelector('#alternatives').hidden")
    page.move("#output .token:nth-of-type(8)")
    page.until("!document.querySelector('#alternatives').hidden")
    rows = page.evaluate(
        "[...document.querySelectorAll('#alternatives tr')].map(row => [row.className, row.textContent])"
    )
    assert len(rows) >= 5 and [kind for kind, _ in rows].count("chosen") == 1
    assert all(text.endswith("%") for _, text in rows)
    page.move("h1")
    page.until("document.querySelector('#alternatives').hidden")
    page.evaluate("document.querySelector('#output').focus()")
    for _ in range(3):
        page.press("ArrowRight")
    focused = "[...document.querySelectorAll('#output .token')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 2
    assert not page.evaluate("document.querySelector('#alternatives').hidden")


def test_what_is_asked_and_answered_is_text(page: Page) -> None:
    # The prompt is one piece, an answer of this model one a character.
    marked = "<b>x</b><img src=y onerror=z>"
    page.type("#prompt", marked)
    page.type("#regex", marked)
    page.type("#max_tokens", "60")
    page.click("#generate")
    page.until(f"{IDLE} && {TOKENS} > 0")
    assert page.evaluate(TEXT) == marked + marked
    assert page.evaluate("document.querySelectorAll('#output b, #output img').length") == 0


def test_an_error_is_told(server: Running, page: Page) -> None:
    page.type("#regex", "(")
    page.click("#generate")
    page.until("!document.querySelector('#error').hidden")
    assert "regex cannot be used" in page.evaluate("document.querySelector('#error').textContent")
    # The browser's console tells of every answer that is an error.
    assert all("400" in problem for problem in page.problems)
    page.problems.clear()


# The contrast of two colours, as WCAG has it.
CONTRAST = """(selector => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = numbers(colour).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let at = document.querySelector(selector), behind = at;
  const clear = one => numbers(getComputedStyle(one).backgroundColor)[3] === 0;
  while (clear(behind) && behind.parentElement) behind = behind.parentElement;
  const pair = [light(getComputedStyle(at).color), light(getComputedStyle(behind).backgroundColor)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
})"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 360])
def test_the_page_is_read_in_light_and_dark_wide_and_narrow(page: Page, dark: bool, width: int) -> None:
    page.look(dark=dark, width=width)
    page.go(page.evaluate("location.href"))
    page.until("document.querySelector('#model').textContent.includes('context')")
    page.type("#max_tokens", "80")
    page.click("#generate")
    page.until(f"{IDLE} && {TOKENS} > 10")
    page.move("#output .token:nth-of-type(4)")
    page.until("!document.querySelector('#alternatives').hidden")
    for selector in ("body", "h1", "#prompt", "#generate", "#hint", "#output", "#alternatives td", "#speed"):
        assert page.evaluate(f"{CONTRAST}('{selector}')") >= 4.5, selector
    for level in range(5):
        if page.evaluate(f"document.querySelector('#output .p{level}') !== null"):
            assert page.evaluate(f"{CONTRAST}('#output .p{level}')") >= 4.5, level
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background.strip("rgba()").split(",")[:3])) / 3
    assert brightness < 80 if dark else brightness > 200
    # Nothing stands beyond the window's side.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if PICTURES:
        name = f"{'dark' if dark else 'light'}-{width}.png"
        (Path(PICTURES) / name).write_bytes(page.picture())
