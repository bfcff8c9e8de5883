"""GPT: the model as people use it: read and saved, asked to generate and to score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never, Self

import torch

from gptkern import generate as fronts
from gptkern.checkpoint.contents import Contents
from gptkern.checkpoint.generation import of_config
from gptkern.checkpoint.hf import CONFIG
from gptkern.checkpoint.load import check_quantization, load, open_checkpoint
from gptkern.checkpoint.locate import EMBEDDED, locate
from gptkern.checkpoint.pending import Files, read
from gptkern.checkpoint.placing import checked_device, checked_dtype, refuse_options
from gptkern.checkpoint.save import save
from gptkern.config import GPTConfig
from gptkern.engine.executors.choose import routes
from gptkern.generate import Completion, GenerateOutput, Score, TextStream
from gptkern.generate.engines import Engines
from gptkern.model.decoder import Decoder
from gptkern.quantization import Quantization
from gptkern.quantize import quantize_model
from gptkern.routes import Explanation
from gptkern.tokenizer import Tokenizer
from gptkern.tokenizer.beside import tokenizer_for


class GPT(Decoder):
    """A GPT language model: GPT-2's family, or the GPT of 2018 (``model_type="openai-gpt"``).

    Args:
        config: Its shape and switches. Weights are fresh, as GPT-2 initialises them.

    ``GPT.from_pretrained`` reads a checkpoint; ``generate``, ``stream``, ``generate_text`` and
    ``score`` are the ways to use one.

    Attributes:
        config: Its shape and switches.
        tokenizer: The one found beside the checkpoint, or None; assign one to use and save it.
        quantization: How the linear layers' weights are kept; None: as they were trained.
        generation_config: The defaults of ``generate`` under transformers' names, as the checkpoint's
            ``generation_config.json`` has them; may be changed.
        config_extras: Fields of the checkpoint's ``config.json`` that ``config`` has no name for (labels,
            ``task_specific_params``); saved again.
        kv_scales: Of an fp8 cache, of keys and of values ``(n_layer, n_head)``; None: 1. Saved and
            loaded with the weights. ``gptkern.quantize.kv_scales`` finds them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.generation_config: dict[str, Any] = of_config(config)
        self.config_extras: dict[str, Any] = {}
        self.tokenizer: Tokenizer | None = None
        self.engines = Engines()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path = EMBEDDED,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        check_finite: bool = False,
        tokenizer: Tokenizer | str | Path | None = None,
        weights: str | None = None,
        group_size: int | None = None,
        zero_point: bool | None = None,
        **unknown: Never,
    ) -> Self:
        """Read a checkpoint, in evaluation mode; its tokenizer, where there is one, comes along.

        Args:
            path_or_hub_id: A folder of transformers' (``gpt2``, ``distilgpt2``, ``openai-gpt``), a nanoGPT
                ``ckpt.pt``, an llm.c GPT-2 ``.bin``, a hub id, or ``"embedded"``, the package's own model.
            dtype: The weights' floating-point type, or its name, ``"bfloat16"``; None keeps the checkpoint's.
            device: Where they go; PyTorch's default device when None.
            revision: Branch, tag or commit of a hub id.
            local_files_only: Take a hub id from the cache only, as HF_HUB_OFFLINE=1 does.
            check_finite: Refuse weights that are NaN or infinite.
            tokenizer: Its tokenizer, or where that is: what ``Tokenizer.from_pretrained`` takes. None takes
                the one beside the checkpoint: of nanoGPT's files also ``meta.pkl``, of files with GPT-2's
                vocabulary also GPT-2's from the hub's cache, with a warning.
            weights: ``"int8"``, ``"fp8"`` or ``"int4"`` keeps the linear layers so; None as the checkpoint
                has them. One that ``gptkern quantize`` wrote is quantised already.
            group_size, zero_point: Of int4: inputs that share a scale (128, 64 or 32; the largest that
                divides the widths when None), and whether they share a zero (they do unless False).

        Raises:
            CheckpointError: Nothing there, damaged, of another architecture or shape; the message names
                file, tensor, expected and found.
            TypeError: An option that is not known; those of transformers are named with what does the same.
            ValueError: ``weights`` that this model or device cannot take, a dtype that weights cannot have, a
                device that is not there; before any weight is read.
        """
        refuse_options(unknown, cls.from_pretrained.__kwdefaults__ or ())
        dtype, device = checked_dtype(dtype), checked_device(device)
        path = locate(path_or_hub_id, revision=revision, local_files_only=local_files_only)

        def opened(files: Files) -> tuple[Contents, Tokenizer | None]:
            # Every save replaces it: asked for here, weights and tokenizer are of one save.
            _ = files / CONFIG
            contents = open_checkpoint(path)
            return contents, tokenizer_for(contents, tokenizer, local_files_only=local_files_only)

        contents, found_tokenizer = read(path, opened) if path.is_dir() else opened(Files(path.parent, {}))
        wanted = None
        if weights is not None:
            wanted = Quantization.make(contents.config, weights, group_size, zero_point)
        elif group_size is not None or zero_point is not None:
            raise ValueError("GPT: group_size and zero_point need weights='int4'")
        check_quantization(contents, wanted, device)
        model = load(cls, contents, dtype=dtype, device=device, check_finite=check_finite)
        if wanted is not None:
            quantize_model(model, wanted)
        if contents.kv_scales is not None:
            k_scale, v_scale = (scale.to(model.device) for scale in contents.kv_scales)
            model.kv_scales = (k_scale, v_scale)
        if contents.generation_config is not None:
            model.generation_config = contents.generation_config
        model.config_extras = contents.extras
        model.tokenizer = found_tokenizer
        return model

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write a folder that ``from_pretrained`` and transformers open, with the tokenizer if there is one.

        It is all or nothing: killed at any point, the old folder or the new one is there. Files of the
        folder that are no part of a model stay. What the checkpoint said beside the model's shape is written
        again (``config_extras``, ``generation_config``).

        Args:
            folder: Made if it is not there.
            max_shard_size: Weights beyond it go into several files; bytes, or text like ``"500MB"``.

        Raises:
            ValueError: ``folder`` is empty text.
            CheckpointError: ``folder`` is a file, the tokenizer there or here does not fit the model, or the
                head is not the embedding that ``config.tie_word_embeddings`` says it is.
            OSError: It could not be written (a full disk): the old model is whole, or the new one.
        """
        save(self, folder, max_shard_size=max_shard_size)

    def take_settings(self, other: GPT) -> None:
        """Take over what belongs to a model beside weights and config: tokenizer, generation's defaults."""
        self.tokenizer = other.tokenizer
        self.generation_config = dict(other.generation_config)
        self.config_extras = dict(other.config_extras)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | GenerateOutput:
        """Continue prompts, with the names, meaning and defaults of transformers' ``generate``.

        An option that is not given is what the checkpoint says (``generation_config``), else the default; one
        that is given goes before both, None included, which is the default.
        Dropout is off in every mode, and the mode stays as it is: a model may generate while it is trained.
        Padding may be on any side; new tokens follow the whole row.

        Args:
            input_ids: ``(batch, seq)`` integers.
            attention_mask: ``(batch, seq)``, 1 for tokens and 0 for padding.
            streamer: Given the prompt, then each step's tokens, by ``put``; ``end`` follows the last.
            tokenizer: For ``stop_strings``, where the model came without one.
            output_logprobs: Return a ``GenerateOutput`` with the log-probability of each new token.
            top_logprobs: Return one with the log-probabilities of so many most likely tokens at each new
                one too.
            logits_processor: One callable or several, called row by row with the row's tokens so far
                ``(1, length)`` int64, padding left out, and its logits ``(1, vocab_size)`` fp32, before the
                options below apply; each returns logits of the same shape. transformers' processors are such.
            stopping_criteria: One callable or several, called with a row's tokens ``(1, length)``, on the
                CPU, and None; a row ends with the token after which one returns True.
            return_dict_in_generate: Return a ``GenerateOutput``.
            **kwargs: The options that ``gptkern.generate.GenerateOptions`` lists.

        Returns:
            ``(batch * num_return_sequences, seq + new)`` int64, filled up with ``pad_token_id``; or a
            ``GenerateOutput``, which holds them.

        Raises:
            TypeError, ValueError: A bad option or prompt, or more tokens than the context holds; the
                message says what is accepted.
        """
        return fronts.generate(self, input_ids, attention_mask, **kwargs)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> TextStream:
        """Yield the continuation of a prompt piece by piece, as it is made.

        No piece ends in half a character or holds any of a stop string. Empty text is the beginning of
        a text. Options and errors are those of ``generate``, raised at once.
        """
        return fronts.stream(self, prompt, **options)

    def generate_text(self, prompts: str | Sequence[str | Sequence[int]], **options: Any) -> list[Completion]:
        """Continue prompts, text or token ids: ``num_return_sequences`` completions of each, in order.

        Options and errors are those of ``generate``.
        """
        return fronts.generate_text(self, prompts, **options)

    def score(
        self,
        texts: str | Sequence[str | Sequence[int]],
        context: str | Sequence[str | Sequence[int]] | None = None,
        *,
        stride: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> list[Score]:
        """The exact log-likelihood of each text, token by token.

        Args:
            texts: Text, or token ids.
            context: What comes before and is not scored, one for all texts or one each; encoded apart
                (a GPT-2 text then begins with a space: " Paris"). ``""`` is the beginning-of-text
                token; with None a text's first token is not scored.
            stride: Score texts beyond the context in windows of it, each moved on by so many tokens, so
                that every token sees at least ``n_positions - stride`` before it.

        Raises:
            ValueError: A text beyond the context and no stride, an empty text, a token id out of range.
        """
        return fronts.score(self, texts, context, stride=stride, tokenizer=tokenizer)

    def explain(self) -> Explanation:
        """How each part of the model runs, and why."""
        return Explanation(routes(self))


def explain(model: Any, generation_config: Any = None) -> Explanation:
    """How each part of a model runs, and why.

    Args:
        model: A ``GPT``, or a model of transformers, accelerated or not.
        generation_config: Of a transformers model, what ``generate`` is asked about; its own when None.

    Raises:
        TypeError: Another kind of model.
        ValueError: A ``generation_config`` with a ``GPT``, whose ``generate`` has none.
    """
    if isinstance(model, GPT):
        if generation_config is not None:
            raise ValueError("explain: generation_config is for transformers' models; model is a GPT")
        return model.explain()
    # Not at the top: transformers may not be there.
    from gptkern.transformers import swap

    return swap.explain(model, generation_config)
