"""The model that a run begins with, as [model] describes it: a checkpoint, or the shape of a new model.

A new GPT has the fields of ``GPTConfig``; one of another family has ``family`` and fields of that family's
``config.json``. Which fields a family goes by is what its table reads (``FamilyConfig.fields_read``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gptkern.config import Config, FamilyConfig, GPTConfig
from gptkern.model.families import FAMILIES
from gptkern.tokenizer import Tokenizer
from gptkern.train.errors import SettingsError, check_names

# What a family's configuration has by other names, or has not: [model]'s own.
_OWN = {"family", "dropout"}
# A family's defaults are those of a model of billions of parameters: these are asked for.
_SIZES = (
    *("hidden_size", "n_embd", "intermediate_size", "ffn_dim"),
    *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head"),
)
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_model(model: Mapping[str, Any], context: int) -> None:
    """Check the table [model] of a run whose sequences have ``context`` tokens.

    Raises:
        SettingsError: A name that is not known or a value out of its range; the message says which.
    """
    for name in ("from", "family"):
        if name in model and (not isinstance(model[name], str) or not model[name]):
            needed = "a folder or a hub id" if name == "from" else "the name of a family"
            raise SettingsError(f"[model] {name} is {model[name]!r}; {needed} is needed")
    if "from" in model and model.keys() - {"from", "dropout"}:
        other = sorted(model.keys() - {"from", "dropout"})
        raise SettingsError(
            f"[model] from is given, so the shape is the checkpoint's: remove {', '.join(other)}"
        )
    vocab_size = model.get("vocab_size", 1)
    if type(vocab_size) is not int or vocab_size < 1:
        raise SettingsError(f"[model] vocab_size is {vocab_size!r}; a positive integer is needed")
    dropout = model.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0.0 <= dropout < 1.0:
        raise SettingsError(f"[model] dropout is {dropout!r}; 0 <= dropout < 1 is needed")
    if "family" in model:
        _check_family(model, context)
    else:
        check_names("[model] ", model, {f.name for f in fields(GPTConfig)} | {"from", *_OWN})


def _check_family(model: Mapping[str, Any], context: int) -> None:
    name = model["family"]
    if name not in FAMILIES:
        raise SettingsError(
            f"[model] family is {name!r}; known are {', '.join(FAMILIES)}: without one it is a GPT, "
            "by the fields of GPTConfig"
        )
    missing = [size for size in _SIZES if size in FAMILIES[name].defaults and size not in model]
    if missing:
        raise SettingsError(
            f"[model] {', '.join(missing)} of a {name} are needed: other fields have transformers' defaults"
        )
    given = {key: value for key, value in model.items() if key not in _OWN}
    config = _made({**_context(name, context), **given}, name)
    assert isinstance(config, FamilyConfig)
    known = {*config.fields_read, "initializer_range", *_SPECIAL}
    check_names("[model] ", given, known, f"a field that a {name} of this shape goes by")


def fresh_config(model: Mapping[str, Any], context: int, tokenizer: Tokenizer | None) -> Config:
    """The configuration of a new model; its vocabulary and special tokens are the tokenizer's.

    Raises:
        SettingsError: A field out of its range, or a vocabulary that is too small or not known.
    """
    family = model.get("family")
    chosen = {name: value for name, value in model.items() if name not in _OWN}
    chosen = {**_context(family, context), **chosen}
    if tokenizer is not None:
        chosen.setdefault("vocab_size", tokenizer.vocab_size)
        if tokenizer.vocab_size > chosen["vocab_size"]:
            raise SettingsError(
                f"[model] vocab_size is {chosen['vocab_size']}; "
                f"the tokenizer has {tokenizer.vocab_size} tokens"
            )
    elif "vocab_size" not in chosen:
        raise SettingsError(
            "[model] vocab_size is needed: token shards do not say it, and no tokenizer is named"
        )
    if tokenizer is not None or family is not None:
        # A family's own default tokens may lie beyond this vocabulary.
        for name in _SPECIAL if family is not None else _SPECIAL[:2]:
            chosen.setdefault(name, getattr(tokenizer, name, None))
    config = _made(chosen, family)
    rates = {name for name in config.dropout_fields if "dropout" in model and name not in chosen}
    return config.replace(**dict.fromkeys(rates, model.get("dropout")))


def _context(family: str | None, context: int) -> dict[str, int]:
    """The longest context of a new model, under its family's name."""
    long = family is not None and "max_position_embeddings" in FAMILIES[family].defaults
    return {"max_position_embeddings" if long else "n_positions": context}


def _made(values: Mapping[str, Any], family: str | None) -> Config:
    try:
        if family is None:
            return GPTConfig(**values)
        return FamilyConfig.from_dict({**values, "model_type": family})
    except (TypeError, ValueError) as error:
        raise SettingsError(f"[model] {error}") from error
