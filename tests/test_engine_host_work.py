"""Work of the host that a pass of the engine leaves out while its rows stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gptkern import GPT, Engine, GPTConfig, Request, backend
from gptkern.engine import rows, sampling
from gptkern.engine.cache import KVCache
from gptkern.engine.executors import choose
from gptkern.engine.executors.choose import Executors
from gptkern.ops import _dispatch

PAGE = 16
PROMPT = [1, 2, 3]
CONFIG = GPTConfig(vocab_size=61, n_positions=128, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often the host built something, and asked what it may have to build."""
    # The way of a CPU without the interpreter.
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, call: Callable[..., Any]) -> None:
        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, property(counting) if name == "decode" else counting)

    count(KVCache, "_demands", KVCache._demands)
    count(rows, "pack_table", rows.pack_table)
    count(sampling, "sample_outputs", sampling.sample_outputs)
    count(sampling, "padded", sampling.padded)
    count(Executors, "decode", Executors.decode.fget)
    count(choose, "choose", choose.choose)
    with backend("auto"):
        yield counts


def test_a_pass_of_the_same_rows_builds_nothing(counted: Counter[str]) -> None:
    engine = _running(counted)
    for _ in range(PAGE - len(PROMPT) - 2):
        assert len(engine.step()) == 2
        assert counted == {"decode": 1}
        counted.clear()


def test_a_new_page_is_taken_and_laid_once(counted: Counter[str]) -> None:
    engine = _running(counted)
    for _ in range(PAGE):
        engine.step()
    assert counted == {"decode": PAGE, "_demands": 1, "pack_table": 1}


def test_a_row_that_joins_builds_the_samplers_tensors_anew_once(counted: Counter[str]) -> None:
    engine = _running(counted)
    engine.add(Request(prompt=PROMPT, options={"max_new_tokens": 20}))
    engine.step()
    counted.clear()
    assert len(engine.step()) == 3
    assert counted["sample_outputs"] == counted["padded"] == 0


def test_an_admission_checks_no_model_that_is_as_it_was(counted: Counter[str]) -> None:
    engine = _running(counted)
    for _ in range(3):
        engine.add(Request(prompt=PROMPT, options={"max_new_tokens": 20}))
        engine.step()
    assert counted["choose"] == 0
    engine.model.transformer.h[1].ln_2.eps = 0.5
    engine.step()
    assert counted["choose"] == 0
    engine.add(Request(prompt=PROMPT, options={"max_new_tokens": 20}))
    engine.step()
    assert counted["choose"] == 1
    assert engine.executors.reason == "transformer.h.1.ln_2 has eps 0.5, where the config gives 1e-05"


def _running(counted: Counter[str]) -> Engine:
    """An engine that decodes two rows, with counts that begin now."""
    engine = Engine(GPT(CONFIG).eval(), page_size=PAGE, prefill_chunk=PAGE)
    for _ in range(2):
        engine.add(Request(prompt=PROMPT, options={"max_new_tokens": 3 * PAGE, "eos_token_id": None}))
    engine.step()
    engine.step()
    counted.clear()
    return engine
