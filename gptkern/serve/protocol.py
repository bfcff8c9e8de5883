"""The bodies of requests: every field with its type, its range and its meaning.

An unknown field is refused, so that nothing is silently left out. None stands for a field's default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_COPIES = 128
MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_MESSAGES = 4096
MOST_PROMPTS = 4096
MOST_STEERING = 16
# More than any body has: each further one would be an error of its own.
_MOST_FIELDS = 64
# What the document says of a token's id until it knows the vocabulary.
TOKEN_FORMAT = "token-id"


def _whole(value: Any, depth: int = 3) -> Any:
    """Whole numbers as such: to JSON 2.0 is one. In lists, and lists of lists, too."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if depth and isinstance(value, list) and not {float, list}.isdisjoint(map(type, value)):
        return [_whole(entry, depth - 1) for entry in value]
    return value


def _few(value: Any) -> Any:
    """Refuse a table of very many entries before each is looked at."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise PydanticCustomError(
            "too_long", "Input should have at most {most} entries", {"most": MOST_BIASES}
        )
    return value


Whole = BeforeValidator(_whole)
# A list of a million mistakes is told by its first.
FirstMistake = Field(fail_fast=True)
Token = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"format": TOKEN_FORMAT})]
Text = Annotated[str, Field(max_length=256, min_length=1)]


def _exclude(*names: str) -> dict[str, Any]:
    """The JSON schema of bodies in which no two fields both have a value."""
    return {
        "not": {"required": list(names), "properties": {name: {"not": {"type": "null"}} for name in names}}
    }


def _needs(name: str, kind: str, other: str) -> dict[str, Any]:
    """The JSON schema of bodies in which a field has a value only where another is true."""
    return {
        "if": {"required": [name], "properties": {name: {"type": kind}}},
        "then": {"required": [other], "properties": {other: {"const": True}}},
    }


# What the fields of a body say about each other, for its document.
_GENERATION_RULES: list[Any] = [
    _needs("stream_options", "object", "stream"),
    _exclude("regex", "grammar"),
    _exclude("regex", "response_format"),
    _exclude("grammar", "response_format"),
]
_CHAT_RULES: list[Any] = [
    _needs("top_logprobs", "integer", "logprobs"),
    _exclude("max_tokens", "max_completion_tokens"),
]


class Fields(BaseModel):
    """A body: no other fields, and no other types than those named."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _is_short(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", "Input should have fewer fields")
        return value


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="Send the usage in a last chunk of its own.")


class JsonSchema(Fields):
    """A schema that an answer has to follow."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema.")
    strict: bool | None = None


class ResponseFormat(Fields):
    """The form of an answer."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"type": {"const": "json_schema"}}},
            "then": {"required": ["json_schema"], "properties": {"json_schema": {"type": "object"}}},
            "else": {"properties": {"json_schema": {"type": "null"}}},
        }
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationFields(Fields):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(json_schema_extra={"allOf": _GENERATION_RULES})

    model: str = Field(description="Name of the model, as `/v1/models` lists it.")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31), Whole] | None = Field(
        None, description="Most new tokens: 16 of a completion, the rest of the context in a chat."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="Sharpness of sampling; 0 takes the likeliest token. Default 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Nucleus sampling: the smallest set of tokens of this probability. Default 1."
    )
    top_k: Annotated[int, Field(ge=-1, lt=2**31), Whole] | None = Field(
        None, description="Sample from this many likeliest tokens; 0 or -1: from all. Default 0."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Drop tokens less likely than this share of the likeliest. Default 0."
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Locally typical sampling. Default 1: off."
    )
    n: Annotated[int, Field(ge=1, le=MOST_COPIES), Whole] | None = Field(
        None, description="Continuations of each prompt. Default 1."
    )
    stop: Text | Annotated[list[Text], FirstMistake, Field(max_length=MOST_STOPS)] | None = Field(
        None, description="Text, or up to 16 texts, before which an answer ends."
    )
    stop_token_ids: Annotated[list[Token], FirstMistake, Field(max_length=MOST_BIASES), Whole] | None = Field(
        None, description="Tokens that end an answer, beside the end of text."
    )
    ignore_eos: bool | None = Field(None, description="Go on behind the end of text. Default false.")
    min_tokens: Annotated[int, Field(ge=0, lt=2**31), Whole] | None = Field(
        None, description="New tokens before which no answer ends by a token. Default 0."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), Whole] | None = Field(
        None, description="Equal requests of one seed get equal answers, whatever else runs."
    )
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MOST_BIASES),
            BeforeValidator(_few),
        ]
        | None
    ) = Field(None, description="Amounts added to the logits of tokens, by their ids.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Taken once from the logits of tokens already generated. Default 0."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Taken from a token's logit for each time that it was generated. Default 0."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description="Above 1, discourages tokens of the prompt and of the answer. Default 1."
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), Whole] | None = Field(
        None, description="Log-probabilities of the prompt's tokens, and of so many likeliest ones."
    )
    stream: bool | None = Field(None, description="Send the answer as it is made. Default false.")
    stream_options: StreamOptions | None = Field(None, description="`include_usage`, with `stream`.")
    response_format: ResponseFormat | None = Field(
        None, description="`json_object`, or a `json_schema` that the answer follows."
    )
    regex: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="A regular expression that the answer matches."
    )
    grammar: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="A grammar, in Lark's syntax, that the answer follows."
    )
    steering: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-1000, le=1000)]],
            Field(max_length=MOST_STEERING),
            BeforeValidator(_few),
        ]
        | None
    ) = Field(
        None,
        description="Steering vectors by the names they were registered under, each with its strength: their "
        "sum is added to the hidden states of all tokens.",
    )
    user: str | None = Field(None, description="Accepted and not used.")


_Texts = Annotated[list[str], FirstMistake, Field(min_length=1, max_length=MOST_PROMPTS)]
_Ids = Annotated[list[Token], FirstMistake, Field(min_length=1)]
_IdLists = Annotated[list[_Ids], FirstMistake, Field(min_length=1, max_length=MOST_PROMPTS)]


class CompletionRequest(GenerationFields):
    """The body of `/v1/completions`."""

    prompt: Annotated[
        str
        | _Texts
        | _Ids
        | Annotated[list[_Ids], FirstMistake, Field(min_length=1, max_length=MOST_PROMPTS)],
        Whole,
    ] = Field(description="Text or token ids, or a list of either.")
    echo: bool | None = Field(None, description="Let the answer begin with the prompt. Default false.")
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), Whole] | None = Field(
        None, description="Log-probabilities of the tokens, and of so many likeliest ones."
    )


class TextPart(Fields):
    """A part of a message: text is the only kind that is served."""

    type: Literal["text"]
    text: str


class Message(Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], FirstMistake, Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationFields):
    """The body of `/v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra={"allOf": [*_GENERATION_RULES, *_CHAT_RULES]})

    messages: Annotated[list[Message], FirstMistake, Field(min_length=1, max_length=MOST_MESSAGES)] = Field(
        description="The conversation: objects with a `role` and a `content` of text."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31), Whole] | None = Field(
        None, description="The newer name of `max_tokens`."
    )
    logprobs: bool | None = Field(None, description="Log-probabilities of the tokens. Default false.")
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), Whole] | None = Field(
        None, description="How many likeliest tokens to tell in the place of each."
    )


class TokenizeRequest(Fields):
    """The body of `/tokenize`: a prompt, or the messages of a chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        }
    )

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FirstMistake, Field(min_length=1, max_length=MOST_MESSAGES)] | None = (
        None
    )
    add_special_tokens: bool | None = Field(None, description="Put around a prompt what belongs there.")


class DetokenizeRequest(Fields):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Token], FirstMistake, Whole]
