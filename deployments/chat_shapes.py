"""OpenAI's requests for text, as far as they mean something here: every field named, typed and bounded.

An engine's private fields (a chat template, a grammar, embeddings for a prompt) are unknown and so refused:
each of them has killed or wedged somebody's engine.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from jsonschema import Draft202012Validator, SchemaError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from deployments.shapes import MaxBytes
from nexus.types import Image, Message, Prompt

MAX_CHARACTERS = 2**20  # of all text in one request
MAX_SCHEMA_NODES = 2000
MAX_SCHEMA_BYTES = 256 * 1024
MAX_PATTERN = 256
MAX_TOKENS = 2**20
INT64 = 2**63 - 1
NAME = re.compile(r"[A-Za-z0-9_\-]{1,64}")


class Strict(BaseModel):
    """No unknown field, and no string where a number is meant."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _is_text(text: str) -> str:
    if "\x00" in text or any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError("text must not hold NUL or half of a surrogate pair")
    return text


Text = Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(_is_text)]
ModelName = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_is_text)]
Token = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Weight = Annotated[float, Field(ge=0, le=1000)]


def _is_schema(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A JSON schema that means something, of bearable size, without references to elsewhere."""
    for nodes, node in enumerate(_walk(schema), 1):
        if nodes > MAX_SCHEMA_NODES:
            raise ValueError(f"a schema has at most {MAX_SCHEMA_NODES} values")
        if isinstance(node, Mapping):
            _check_node(node)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"this is no JSON schema: {error.message[:200]}") from None
    except (OverflowError, RecursionError):
        raise ValueError("this JSON schema asks for more than can be checked") from None
    return schema


def _walk(value: object) -> Iterator[object]:
    yield value
    below = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for one in below:
        yield from _walk(one)


def _check_node(node: Mapping[str, object]) -> None:
    for name in ("$ref", "$dynamicRef", "$recursiveRef"):
        reference = node.get(name, "#")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise ValueError("a schema refers only to parts of itself, with '#'")
    keyed = node.get("patternProperties")
    for pattern in (node.get("pattern"), *(keyed if isinstance(keyed, Mapping) else ())):
        if isinstance(pattern, str):
            _check_pattern(pattern)


def _check_pattern(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern has at most {MAX_PATTERN} signs")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {pattern[:50]!r} cannot be read: {error}") from None


Schema = Annotated[dict[str, JsonValue], MaxBytes(MAX_SCHEMA_BYTES), AfterValidator(_is_schema)]


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    url: Annotated[str, Field(min_length=1, max_length=32 * 2**20)]
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class CalledFunction(Strict):
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    arguments: Text


class ToolCall(Strict):
    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=256)] | None = None
    name: Annotated[str, Field(max_length=128)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError("content: only an assistant's message that called tools may have none")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: a tool's message has one, and no other")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only an assistant's message has them")
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts()):
            raise ValueError("content: only a user's message has pictures")
        return self

    def parts(self) -> list[TextPart | ImagePart]:
        if isinstance(self.content, list):
            return self.content
        return [] if self.content is None else [TextPart(type="text", text=self.content)]

    def text(self) -> str:
        return "\n".join(part.text for part in self.parts() if isinstance(part, TextPart))

    def to_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        content: str | tuple[str | Image, ...] = self.text() or (self.refusal or "")
        if any(isinstance(part, ImagePart) for part in self.parts()):
            content = tuple(p.text if isinstance(p, TextPart) else Image(p.image_url.url) for p in self.parts())
        calls = tuple(call.model_dump() for call in self.tool_calls or ())
        return Message(role, content, calls, self.tool_call_id)


class Function(Strict):
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    description: Annotated[Text, Field(max_length=8192)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Strict):
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    schema_: Annotated[Schema, Field(alias="schema")]
    description: Annotated[Text, Field(max_length=8192)] | None = None
    strict: bool | None = None


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(Strict):
    include_usage: bool = False


class Sampling(Strict):
    """What chat and text completions have in common.

    `latency_weight`, `throughput_weight` and `accuracy_weight` say what counts where `model` is `auto`.
    """

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Token | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: Annotated[Text, Field(max_length=256)] | Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=16)
    ] | None = None  # fmt: skip
    seed: Annotated[int, Field(ge=-INT64, le=INT64)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=300),
    ] | None = None  # fmt: skip
    user: Annotated[str, Field(max_length=256)] | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    latency_weight: Weight | None = None
    throughput_weight: Weight | None = None
    accuracy_weight: Weight | None = None

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def given(self, *names: str) -> dict[str, Any]:
        """The named fields that the client has set, as it wrote them."""
        return self.model_dump(by_alias=True, include=set(names), exclude_none=True)

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only for a stream")
        return self


class ChatCompletion(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2000)]
    max_completion_tokens: Token | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
                        Field(max_length=16)] | None = None  # fmt: skip
    store: bool | None = None

    @model_validator(mode="after")
    def _is_bearable(self) -> Self:
        if sum(len(message.text()) for message in self.messages) > MAX_CHARACTERS:
            raise ValueError(f"messages: all of their text has at most {MAX_CHARACTERS} characters")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice: there are no tools to choose from")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        return self

    def question(self) -> str:
        """The last turn of the user."""
        return next((m.text() for m in reversed(self.messages) if m.role == "user"), "")

    def context(self) -> str:
        """The turns before it, as text."""
        turns = [f"{m.role}: {m.text()}" for m in self.messages if m.role in ("user", "assistant")]
        return "\n".join(turns[:-1])

    def to_prompt(self, tenant: str) -> Prompt:
        options = self.given(
            "top_p", "n", "frequency_penalty", "presence_penalty", "logit_bias", "tools", "tool_choice",
            "parallel_tool_calls", "response_format", "logprobs", "top_logprobs", "reasoning_effort",
        )  # fmt: skip
        return Prompt(
            tuple(message.to_message() for message in self.messages), "", (),
            self.max_completion_tokens or self.max_tokens, self.temperature, self.seed, self.stops(),
            options, None, self.session_id or "", tenant,
        )  # fmt: skip


class Completion(Sampling):
    """OpenAI's older request: a bare text to go on from."""

    prompt: Annotated[Text, Field(max_length=MAX_CHARACTERS)] | Annotated[
        list[Annotated[Text, Field(max_length=MAX_CHARACTERS)]], Field(min_length=1, max_length=1)
    ]  # fmt: skip
    echo: Literal[False] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Literal[1] | None = None

    def to_prompt(self, tenant: str) -> Prompt:
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        options = self.given("top_p", "n", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs")
        return Prompt(
            (), "", (), self.max_tokens, self.temperature, self.seed, self.stops(), options, text,
            self.session_id or "", tenant,
        )  # fmt: skip
