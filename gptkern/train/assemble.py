"""The parts of a run, made from its settings: the data, the model, the objective."""

from __future__ import annotations

from pathlib import Path

import torch

from gptkern.config import Config
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer
from gptkern.train.data import Array, Source, Windows, load_classes, load_pairs
from gptkern.train.errors import SettingsError
from gptkern.train.lora import add_lora
from gptkern.train.objective import Classification, LanguageModelling
from gptkern.train.processes import Processes
from gptkern.train.settings import DataSettings, Settings
from gptkern.train.shape import fresh_config
from gptkern.train.tokens import check_ids, choose_tokenizer, load_split, read_jsonl, read_text

Objective = LanguageModelling | Classification


def assemble(settings: Settings, out: Path, group: Processes) -> tuple[Source, Objective]:
    """The run's data and its objective, on the run's device; every process must call.

    Raises:
        SettingsError: Data or model do not fit the settings.
        CheckpointError: The model that [model] from names cannot be read.
    """
    pretrained = (
        GPT.from_pretrained(settings.model["from"], dtype=torch.float32) if "from" in settings.model else None
    )
    if pretrained is not None and pretrained.quantization is not None:
        raise SettingsError(
            f"[model] from: {settings.model['from']} is quantised to {pretrained.quantization.format}, "
            "and its matrices cannot be trained: name the model that it was made of"
        )
    own = pretrained.tokenizer if pretrained is not None else None
    data, seed = settings.data, settings.train.seed
    vocab_size = settings.model.get("vocab_size") if pretrained is None else pretrained.spec.vocab_size
    labels: list[str] = []
    shards: list[Array] = []
    source: Source
    if data.kind in ("pairs", "classes"):
        tokenizer: Tokenizer | None = choose_tokenizer(data, own, _all_text(data))
        assert tokenizer is not None
        if data.kind == "pairs":
            source = load_pairs(data, tokenizer, seed)
        else:
            source, labels = load_classes(data, tokenizer, seed)
    else:
        if group.first:
            load_split(data, own, out / "tokens", writer=True, vocab_size=vocab_size)
        group.barrier()
        split = load_split(data, own, out / "tokens", writer=False, vocab_size=vocab_size)
        tokenizer, shards = split.tokenizer, split.train + split.val
        source = Windows(split.train, split.val, data.context, seed)
    torch.manual_seed(seed)
    model = _model(settings, pretrained, tokenizer)
    if group.first:
        check_ids(shards, model.spec.vocab_size)
        _check_sample_prompt(settings, model)
    return source, _objective(settings, model, labels).to(group.device)


def _check_sample_prompt(settings: Settings, model: GPT) -> None:
    """Refuse a sample prompt that the model cannot continue: better now than after an hour."""
    if not settings.eval.samples or settings.data.kind == "classes" or model.tokenizer is None:
        return
    try:
        used = len(model.tokenizer.encode(settings.eval.sample_prompt))
    except ValueError as error:
        raise SettingsError(f"[eval] sample_prompt: {error}") from error
    if not used and model.tokenizer.bos_token_id is None:
        raise SettingsError("[eval] sample_prompt is empty, and the tokenizer has no beginning-of-text token")
    if used >= model.spec.context:
        raise SettingsError(
            f"[eval] sample_prompt has {used} tokens; fewer than the context, {model.spec.context}, "
            "are needed"
        )


def _all_text(data: DataSettings) -> str:
    """The text whose characters a character tokenizer gets; the JSON's own characters do no harm."""
    if data.tokenizer != "char":
        return ""
    paths = data.path + data.val_path
    keys = [data.prompt_key, data.answer_key] if data.kind == "pairs" else [data.text_key]
    # As they are written, and as they are meant: JSON may spell a character as \u00e9.
    values = [row[key] for row in read_jsonl(paths, keys, "path") for key in keys]
    return "".join([read_text(paths, "path"), *values, data.separator, data.end])


def _model(settings: Settings, pretrained: GPT | None, tokenizer: Tokenizer | None) -> GPT:
    if pretrained is not None:
        model = pretrained
        if "dropout" in settings.model:
            rates = dict.fromkeys(pretrained.config.dropout_fields, settings.model["dropout"])
            model = GPT(pretrained.config.replace(**rates))
            model.load_state_dict(pretrained.state_dict())
            model.take_settings(pretrained)
        model.tokenizer = tokenizer or pretrained.tokenizer
        if tokenizer is not None and tokenizer.vocab_size > model.spec.vocab_size:
            raise SettingsError(
                f"[data] tokenizer has {tokenizer.vocab_size} tokens, the model {model.spec.vocab_size}"
            )
    else:
        model = _fresh_model(fresh_config(settings.model, settings.data.context, tokenizer))
        model.tokenizer = tokenizer
    if settings.data.context > model.spec.context:
        raise SettingsError(f"[data] context is {settings.data.context}; the model's is {model.spec.context}")
    return model.train()


def _fresh_model(config: Config) -> GPT:
    # Sizes beyond the memory or beyond int64 come as one of several errors.
    try:
        return GPT(config)
    except (RuntimeError, MemoryError, OverflowError, ValueError) as error:
        first = str(error).splitlines()[0][:200]
        raise SettingsError(f"[model] of this shape cannot be made: {first}") from error


def _objective(settings: Settings, model: GPT, labels: list[str]) -> Objective:
    train, lora = settings.train, settings.lora
    if lora.rank:
        width = model.spec.width
        if lora.rank > width:
            raise SettingsError(f"[lora] rank is {lora.rank}; at most the model's width, {width}, is of use")
        try:
            add_lora(model, lora.rank, lora.alpha, lora.targets)
        except ValueError as error:
            raise SettingsError(f"[lora] {error}") from error
    model.gradient_checkpointing_enable(train.gradient_checkpointing)
    if settings.data.kind == "classes":
        return Classification(model, labels, train.label_smoothing)
    return LanguageModelling(model, train.z_loss, train.label_smoothing)
