"""Beam search with a stop string, and with a rule, against beam search without: the ratio of one run.

    pytest benchmarks/bench_beams.py --benchmark-enable -n 0 -s

The embedded model on a CPU, 4 beams, 400 new tokens. Rounds of the two alternate, and the ratio is the median
over the rounds, of CPU time. The stop string never comes, so that both make the same tokens.
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gptkern import GPT
from gptkern.engine.cache import KVCache

BEAMS, NEW = 4, 400
ROUNDS = int(os.environ.get("GPTKERN_BENCH_ROUNDS", "3"))
MORE: dict[str, dict[str, Any]] = {
    "stop string": {"stop_strings": ["JULIET AND ROMEO"]},
    "rule": {"bad_words_ids": [[0, 0]]},
}


@pytest.mark.parametrize("name", MORE)
def test_cost(benchmark: BenchmarkFixture, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT.from_pretrained("embedded", device="cpu")
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode("ROMEO:")])
    copied: list[int] = []
    own_tail = KVCache._own_tail
    monkeypatch.setattr(KVCache, "_own_tail", lambda self, row: (copied.append(1), own_tail(self, row))[1])

    def search(**more: Any) -> Any:
        begin = time.process_time()
        tokens = model.generate(
            ids, num_beams=BEAMS, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **more
        )
        return tokens, time.process_time() - begin

    plain, _ = search()
    tokens, _ = search(**MORE[name])
    assert torch.equal(plain, tokens)
    rounds = [(search()[1], search(**MORE[name])[1]) for _ in range(ROUNDS)]
    benchmark.pedantic(search, kwargs=MORE[name], rounds=1)
    ratio = median(more / without for without, more in rounds)
    pages = len(copied) / (2 * ROUNDS + 3) / NEW
    benchmark.extra_info |= {"ratio": ratio, "pages copied a pass": pages}
    print(
        f"\n{name}: {ratio:.2f} times the CPU time without; {pages:.2f} pages copied a pass of {BEAMS} beams"
    )
