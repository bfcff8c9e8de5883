"""A gptkern model for EleutherAI's lm-evaluation-harness (extra ``eval``).

On the command line ``python -m gptkern.eval.lm_eval run --model gptkern --model_args pretrained=gpt2 ...`` is
the harness's own with this model in it; in Python::

    lm_eval.simple_evaluate(model=HarnessModel("gpt2"), tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from gptkern.engine.prompt_logprobs import prompt_logprobs
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer

_NEW_TOKENS = 256
# What the harness's options are called here; others are gptkern's own names or refused by it.
_IGNORED = ("min_length", "early_stopping", "use_cache")


@register_model("gptkern")
class HarnessModel(TemplateLM):
    """A model in this process: likelihoods as the server's ``echo`` gives them, texts by the engine.

    Args:
        pretrained: A ``GPT``, or what ``GPT.from_pretrained`` takes.
        device, dtype: As in ``GPT.from_pretrained``.
        batch_size: Accepted, and not needed: the engine makes its own batches.

    Raises:
        ValueError: The model has no tokenizer.
    """

    def __init__(
        self,
        pretrained: GPT | str = "embedded",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.gpt = (
            pretrained
            if isinstance(pretrained, GPT)
            else GPT.from_pretrained(pretrained, device=device, dtype=dtype)
        )
        if self.gpt.tokenizer is None:
            raise ValueError("HarnessModel: the model has no tokenizer beside it")
        self._tokens: Tokenizer = self.gpt.tokenizer
        self.max_length = self.gpt.config.n_positions

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            ValueError: The tokenizer has none.
        """
        return self._named("eos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """The token that comes before a text without a context.

        Raises:
            ValueError: The tokenizer has none.
        """
        return self._named("bos_token_id", "eos_token_id")

    def _named(self, *names: str) -> int:
        found = (getattr(self._tokens, name) for name in names)
        token = next((token for token in found if token is not None), None)
        if token is None:
            raise ValueError(f"HarnessModel: the tokenizer has no {' and no '.join(names)}")
        return int(token)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache."""
        return "gptkern"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The token ids of a text."""
        return self._tokens.encode(string, add_special_tokens=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether greedy would write it."""
        results = []
        for _pair, context, continuation in requests:
            # The last token is predicted and not read: it may stand one beyond the context.
            tokens = (context + continuation)[-(self.max_length + 1) :]
            with torch.inference_mode():
                places = prompt_logprobs(self.gpt, tokens, 1)[-len(continuation) :]
            own = tokens[-len(continuation) :]
            greedy = all(best[0][0] == token for token, (_, best) in zip(own, places, strict=True))
            results.append((sum(logprob for logprob, _ in places), greedy))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the context that do not overlap."""
        results = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            results.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(parts)))
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to one of the texts that end it."""
        results: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        for places in groups.values():
            options, stops, new = self._options(dict(requests[places[0]].args[1]))
            prompts = [
                self.tok_encode(requests[place].args[0])[-(self.max_length - new) :] for place in places
            ]
            made = self.gpt.generate_text(prompts, max_new_tokens=new, stop_strings=stops or None, **options)
            for place, completion in zip(places, made, strict=True):
                results[place] = completion.text
        return results

    def _options(self, choices: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
        """The harness's options as ``generate``'s, the texts that end an answer, and the most new tokens."""
        options = normalize_gen_kwargs(choices, _NEW_TOKENS)
        stops = handle_stop_sequences(options.pop("until", None), eos=self._tokens.eos_token)
        new = min(int(options.pop("max_gen_toks")), self.max_length - 1)
        options = {name: value for name, value in options.items() if name not in _IGNORED}
        if not options.get("do_sample"):
            options = {"do_sample": False}
        return options, [stop for stop in stops if stop], new


def main() -> None:
    """Run the harness's command line, in which the model ``gptkern`` is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
