"""The class ``GPT``, which people use: read and save a checkpoint, generate, score, explain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never, Self

import torch

from gptkern import generate as fronts
from gptkern.checkpoint.contents import Contents
from gptkern.checkpoint.generation import of_config
from gptkern.checkpoint.gguf_file import is_gguf
from gptkern.checkpoint.gguf_tensors import GROUP
from gptkern.checkpoint.hf import CONFIG
from gptkern.checkpoint.load import check_quantization, load, open_checkpoint
from gptkern.checkpoint.locate import EMBEDDED, locate
from gptkern.checkpoint.pending import Files, read
from gptkern.checkpoint.placing import checked_device, checked_dtype, refuse_options
from gptkern.checkpoint.save import save
from gptkern.config import Config
from gptkern.engine.executors.choose import routes
from gptkern.generate import Completion, GenerateOutput, Score, TextStream
from gptkern.generate.engines import Engines
from gptkern.model.decoder import Decoder
from gptkern.quantization import Quantization
from gptkern.quantize import quantize_floats, quantize_model
from gptkern.routes import Explanation
from gptkern.tokenizer import Tokenizer
from gptkern.tokenizer.beside import tokenizer_for


class GPT(Decoder):
    """A GPT language model: GPT-2's family, or the GPT of 2018 (``model_type="openai-gpt"``).

    Args:
        config: The model's shape and switches. Weights are fresh, as GPT-2 initialises them.

    ``GPT.from_pretrained`` reads a checkpoint; ``generate``, ``stream``, ``generate_text`` and
    ``score`` are the ways to use one.

    Attributes:
        config: The model's shape and switches.
        tokenizer: The tokenizer beside the checkpoint, or None; assign one to use and save it.
        quantization: The format of the linear layers' weights; None for floats.
        generation_config: The defaults of ``generate`` under transformers' names, as the checkpoint's
            ``generation_config.json`` has them; you may change them.
        config_extras: Fields of the checkpoint's ``config.json`` that ``config`` has no name for (labels,
            ``task_specific_params``); they are saved with the model.
        kv_scales: (k_scale, v_scale), each ``(n_layer, n_head)``: the scales of an fp8 cache; None for scales
            of 1. They are saved and loaded with the weights; ``gptkern.quantize.kv_scales`` computes them.
    """

    def __init__(self, config: Config) -> None:
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
            device: The device for the weights; None is PyTorch's default device.
            revision: Branch, tag or commit of a hub id.
            local_files_only: Look for a hub id in the cache only, as HF_HUB_OFFLINE=1 does.
            check_finite: Refuse weights that are NaN or infinite.
            tokenizer: A tokenizer, or whatever ``Tokenizer.from_pretrained`` takes. None takes the one
                beside the checkpoint: for nanoGPT's files also ``meta.pkl``, for files with GPT-2's
                vocabulary also GPT-2's tokenizer in the hub's cache, with a warning.
            weights: ``"int8"``, ``"fp8"`` or ``"int4"`` quantises the linear layers; None leaves them as the
                checkpoint has them. A checkpoint that ``gptkern quantize`` wrote is quantised already. With
                ``"int4"`` a GGUF file's matrices in Q4_0 and Q4_1 stay exactly what they are; where it has
                such ones, the others become int8.
            group_size, zero_point: For int4, the number of inputs that share a scale (128, 64 or 32; None is
                the largest that divides the widths), and whether they share a zero point (unless False).

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
        # A GGUF file's own blocks of 4 bits; groups of another size are made anew.
        as_blocks = weights == "int4" and group_size in (None, GROUP) and zero_point is not False
        as_blocks = as_blocks and path.is_file() and is_gguf(path)

        def opened(files: Files) -> tuple[Contents, Tokenizer | None]:
            # Every save replaces this file: reading it first makes weights and tokenizer come from one save.
            _ = files / CONFIG
            contents = open_checkpoint(path, int4=as_blocks)
            return contents, tokenizer_for(contents, tokenizer, local_files_only=local_files_only)

        contents, own_tokenizer = read(path, opened) if path.is_dir() else opened(Files(path.parent, {}))
        target, as_blocks = None, as_blocks and contents.quantization is not None
        if weights is not None and not as_blocks:
            target = Quantization.make(contents.config, weights, group_size, zero_point)
        elif weights is None and (group_size is not None or zero_point is not None):
            raise ValueError("GPT: group_size and zero_point need weights='int4'")
        check_quantization(contents, target, device)
        model = load(cls, contents, dtype=dtype, device=device, check_finite=check_finite)
        if target is not None:
            quantize_model(model, target)
        elif as_blocks:
            quantize_floats(model)
        if contents.kv_scales is not None:
            k_scale, v_scale = (scale.to(model.device) for scale in contents.kv_scales)
            model.kv_scales = (k_scale, v_scale)
        if contents.generation_config is not None:
            model.generation_config = contents.generation_config
        model.config_extras = contents.extras
        model.tokenizer = own_tokenizer
        return model

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write a folder that ``from_pretrained`` and transformers open, with the tokenizer if there is one.

        A save is all or nothing: a process killed at any point leaves the old model or the new one. Files of
        the folder that are no part of a model stay. ``config_extras`` and ``generation_config`` are saved
        as well.

        Args:
            folder: The folder to write; it is created if there is none.
            max_shard_size: The largest size of a file of weights: bytes, or text like ``"500MB"``.

        Raises:
            ValueError: ``folder`` is empty text.
            CheckpointError: ``folder`` is a file, the tokenizer there or here does not fit the model, or the
                head is not the embedding that ``config.tie_word_embeddings`` says it is.
            OSError: A file could not be written (a full disk); the old model is whole, or the new one.
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

        An option that you leave out has the checkpoint's value (``generation_config``), else the default. An
        option that you pass overrides both; None stands for the default.
        Dropout is off in every mode, and the mode stays as it is: a model may generate while it is trained.
        Padding may be on any side; new tokens follow the whole row.

        Args:
            input_ids: ``(batch, seq)`` integers.
            attention_mask: ``(batch, seq)``, 1 for tokens and 0 for padding.
            streamer: An object whose ``put`` gets the prompt, then the new tokens of all rows each time;
                ``end`` follows the last.
            tokenizer: The tokenizer for ``stop_strings``, if the model has none.
            output_logprobs: Return a ``GenerateOutput`` with the log-probability of each new token.
            top_logprobs: Return a ``GenerateOutput`` that also has the log-probabilities of this many most
                likely tokens in the place of each new token.
            logits_processor: One callable or several, called row by row with the row's tokens so far
                ``(1, length)`` int64, padding left out, and its logits ``(1, vocab_size)`` fp32, before the
                options below apply; each returns logits of the same shape. transformers' processors fit.
            stopping_criteria: One callable or several, called with a row's tokens ``(1, length)``, on the
                CPU, and None; a row ends with the token after which one returns True.
            return_dict_in_generate: Return a ``GenerateOutput``.
            steering: Vectors that are added to the hidden states of all of a row's tokens, by layer: 0 is the
                embeddings, i what the first i blocks made. Each is ``(width,)``, or ``(batch, width)`` with
                one for each prompt. The model's layers then run one by one.
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
        """Yield the continuation of a prompt piece by piece, as it is generated.

        No piece ends in half a character or contains part of a stop string. An empty prompt stands for the
        beginning of a text. Options and errors are those of ``generate``, raised at once.
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
            context: Text that comes before and has no score itself, one for all texts or one for each. It is
                encoded apart (a GPT-2 text then begins with a space: " Paris"). ``""`` is the
                beginning-of-text token; with None a text's first token has no score.
            stride: Score texts longer than the model's context in overlapping windows, each this many tokens
                further on, so that every token sees at least ``n_positions - stride`` tokens before it.

        Raises:
            ValueError: A text longer than the context without a stride, an empty text, a token id out of
                range.
        """
        return fronts.score(self, texts, context, stride=stride, tokenizer=tokenizer)

    def explain(self) -> Explanation:
        """The route of each part of the model and the reason for it."""
        return Explanation(routes(self))


def explain(model: Any, generation_config: Any = None) -> Explanation:
    """The route of each part of a model and the reason for it.

    Args:
        model: A ``GPT``, or a model of transformers, accelerated or not.
        generation_config: For a transformers model, the GenerationConfig that is explained; None for the
            model's own.

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
