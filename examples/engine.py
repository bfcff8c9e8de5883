"""Serving: requests join and leave one running batch, and each reads its own tokens as they come.

python examples/engine.py                  # the small model that comes with gptkern
python examples/engine.py path/or/hub-id
"""

import asyncio
import sys

from gptkern import GPT, AsyncEngine, Engine, Request

PROMPTS = ("Once upon a time", "ROMEO:", "The king", "What is")


async def answer(engine: AsyncEngine, model: GPT, number: int, prompt: str) -> None:
    """Ask for one continuation, and print it when its last token is there."""
    await asyncio.sleep(0.02 * number)  # they need not come together
    ids = model.tokenizer.encode(prompt)
    request = Request(prompt=ids, options={"max_new_tokens": 30, "do_sample": True, "seed": number})
    tokens = [event.token async for event in engine.stream(request) if event.token is not None]
    print(f"{number}: {model.tokenizer.decode([*ids, *tokens])!r}")


async def main() -> None:
    """Answer every prompt beside the others; the same text as alone, whoever else is in the batch."""
    model = GPT.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "embedded")
    async with AsyncEngine(Engine(model, max_seqs=2)) as engine:
        await asyncio.gather(*(answer(engine, model, n, prompt) for n, prompt in enumerate(PROMPTS)))


asyncio.run(main())
