"""A Prompt in OpenAI's words, and OpenAI's words as Deltas, for every engine that speaks them."""

from collections.abc import Mapping, Sequence
from typing import Any

from nexus.errors import InvalidRequest, Unavailable, UpstreamInvalid
from nexus.types import Delta, Image, Message, Prompt, Usage

_BESIDE = ("tool_calls", "refusal", "reasoning_content")
_ENDS = {"stop", "length", "tool_calls", "content_filter"}


def to_body(prompt: Prompt, model: str) -> dict[str, Any]:
    """The body of a streamed chat completion, or of a completion where the prompt is a bare text.

    `options` are taken as they are; what the prompt itself says wins over them. The stream ends with the usage.
    Raises InvalidRequest for a picture that is not a `data:` URL: no engine is made to fetch one.
    """
    body: dict[str, Any] = {**prompt.options, "model": model}
    if prompt.text is None:
        body["messages"] = [to_message(message) for message in prompt.messages]
    else:
        body["prompt"] = prompt.text
        most = body.pop("top_logprobs", None)
        if isinstance(body.get("logprobs"), bool):  # a number in a completion, whether and how many in a chat
            body["logprobs"] = (most or 0) if body["logprobs"] else None
    own = {"max_tokens": prompt.max_tokens, "temperature": prompt.temperature, "seed": prompt.seed}
    body |= {name: value for name, value in own.items() if value is not None}
    if prompt.stop:
        body["stop"] = list(prompt.stop)
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def to_message(message: Message) -> dict[str, Any]:
    """One message as OpenAI writes it."""
    written: dict[str, Any] = {"role": message.role}
    if isinstance(message.content, str):
        written["content"] = message.content
    else:
        written["content"] = [_to_part(part) for part in message.content]
    if message.tool_calls:
        written["tool_calls"] = [dict(call) for call in message.tool_calls]
        written["content"] = written["content"] or None
    if message.tool_call_id is not None:
        written["tool_call_id"] = message.tool_call_id
    return written


def _to_part(part: str | Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not part.url.startswith("data:"):
        raise InvalidRequest("a picture must be given as a data: URL", code="url_not_allowed")
    return {"type": "image_url", "image_url": {"url": part.url}}


def read_chunk(chunk: Mapping[str, Any]) -> list[Delta]:
    """What one chunk of a streamed chat completion or completion says; nothing for one that only names the role.

    A chunk's usage comes last of its deltas. Some engines write the usage so far into every chunk: keep the
    last one. Raises UpstreamInvalid for a chunk of another shape, Unavailable where the engine gave up.
    """
    deltas = []
    for choice in _items(chunk.get("choices"), "choices"):
        delta = _read_choice(choice)
        if delta.text or delta.finish_reason or delta.beside:
            deltas.append(delta)
    usage = chunk.get("usage")
    if usage is not None:
        deltas.append(Delta(usage=_read_usage(usage)))
    return deltas


def _read_choice(choice: Mapping[str, Any]) -> Delta:
    said = choice.get("delta")
    if said is None:
        said = {"content": choice.get("text")}
    if not isinstance(said, Mapping):
        raise _strange("delta")
    text, index = said.get("content"), choice.get("index", 0)
    if not (text is None or isinstance(text, str)):
        raise _strange("content")
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise _strange("index")
    beside = {name: said[name] for name in _BESIDE if said.get(name)}
    if said.get("reasoning") and "reasoning_content" not in beside:  # vLLM's newer name of it
        beside["reasoning_content"] = said["reasoning"]
    if "tool_calls" in beside:
        beside["tool_calls"] = [_check_call(call) for call in _items(beside["tool_calls"], "tool_calls")]
    if choice.get("logprobs"):
        beside["logprobs"] = _check_logprobs(choice["logprobs"])
    return Delta(text or "", index, _read_end(choice.get("finish_reason")), beside)


def _check_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function, index = call.get("function") or {}, call.get("index", 0)
    if not isinstance(function, Mapping) or isinstance(index, bool) or not isinstance(index, int):
        raise _strange("tool_calls")
    if not all(
        isinstance(one, str | None) for one in (call.get("id"), function.get("name"), function.get("arguments"))
    ):
        raise _strange("tool_calls")
    return call


def _check_logprobs(logprobs: object) -> dict[str, Any]:
    """Those of its fields that say something, each of which is a list."""
    if not isinstance(logprobs, Mapping):
        raise _strange("logprobs")
    said = {name: value for name, value in logprobs.items() if value is not None}
    if not all(isinstance(value, list) for value in said.values()):
        raise _strange("logprobs")
    return said


def _read_end(reason: object) -> str | None:
    if reason is None or reason == "":
        return None
    if reason in ("abort", "error"):
        raise Unavailable("the model gave up in the middle of its answer; try again")
    if not isinstance(reason, str):
        raise _strange("finish_reason")
    if reason == "function_call":
        return "tool_calls"
    return reason if reason in _ENDS else "stop"  # engines have more words for having come to an end


def _read_usage(usage: object) -> Usage:
    if not isinstance(usage, Mapping):
        raise _strange("usage")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    counts = [usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0, cached or 0]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise _strange("usage")
    return Usage(*counts)


def _items(value: object, field: str) -> Sequence[Mapping[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise _strange(field)
    return value


def _strange(field: str) -> UpstreamInvalid:
    return UpstreamInvalid(f"a model answered a chunk whose {field!r} is not what OpenAI's format has there")
