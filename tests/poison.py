"""Requests that killed or wedged somebody's engine or gateway, one each (notes on reliability, section 4)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Poison:
    """A request that must be answered with a 4xx, and nothing else must happen."""

    name: str
    content: bytes
    path: str = CHAT
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


def poisons(model: str) -> Iterator[Poison]:
    """The whole corpus, addressed to one model."""
    for name, fields in {**SAMPLING, **ENGINE_PRIVATE, **SCHEMAS}.items():
        yield Poison(name, _chat(model, **fields))
    for name, messages in {**_messages(), **_pictures()}.items():
        yield Poison(name, _chat(model, messages=messages))
    for name, text in _raw(model).items():
        yield Poison(name, text)
    completion = {"model": model, "prompt": "a", "max_tokens": 1}
    yield Poison(
        "prompt embeddings", json.dumps({**completion, "prompt_embeds": "gASVKAAAAAAA"}).encode(), "/v1/completions"
    )
    yield Poison("best of a billion", json.dumps({**completion, "best_of": 10**9}).encode(), "/v1/completions")
    yield Poison("a prompt of numbers", json.dumps({**completion, "prompt": [2**40]}).encode(), "/v1/completions")
    yield Poison("echo", json.dumps({**completion, "echo": True}).encode(), "/v1/completions")
    yield Poison("a long prompt", json.dumps({**completion, "prompt": "a" * 2**21}).encode(), "/v1/completions")
    yield Poison(
        "a gzip bomb",
        b"\x1f\x8b\x08" + bytes(1000),
        headers={"content-type": "application/json", "content-encoding": "gzip"},
    )
    parts = (
        b"".join(b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n\r\n' for _ in range(20_000)) + b"--x--\r\n"
    )
    form = {"content-type": "multipart/form-data; boundary=x"}
    yield Poison("many parts", parts, "/rag/add_document", form)
    huge = b'--x\r\ncontent-disposition: form-data; name="' + b"a" * 2**19 + b'"\r\n\r\n\r\n--x--\r\n'
    yield Poison("a huge part header", huge, "/rag/add_document", form)
    search = {"query": "a", "filters": {"source": {"regex": "(a+)+$"}}}
    yield Poison("a regular expression as a filter", json.dumps(search).encode(), "/rag/search")


def _chat(of: str, /, **fields: Any) -> bytes:
    body = {"model": of, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **fields}
    return json.dumps(body).encode()


def _tool(**parameters: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "look", "parameters": parameters}}]


def _format(**spec: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", **spec}}


SAMPLING: dict[str, dict[str, Any]] = {
    "a billion choices": {"n": 1_000_000_000},
    "no choice": {"n": 0},
    "negative max_tokens": {"max_tokens": -1},
    "huge max_tokens": {"max_tokens": 2**63},
    "max_tokens as text": {"max_tokens": "1e9"},
    "max_tokens as a truth": {"max_tokens": True},
    "temperature as text": {"temperature": "hot"},
    "temperature of a thousand": {"temperature": 1000},
    "ten thousand stops": {"stop": ["a"] * 10_000},
    "an empty stop": {"stop": [""]},
    "a long stop": {"stop": "a" * 10_000},
    "a million biases": {"logit_bias": {str(number): 1 for number in range(100_000)}},
    "a bias of a negative token": {"logit_bias": {"-1": 1}},
    "a bias of infinity": {"logit_bias": {"1": 1e308}},
    "a million log probabilities": {"logprobs": True, "top_logprobs": 1_000_000},
    "a seed of 128 bits": {"seed": 2**127},
    "top_p of zero": {"top_p": 0},
    "a penalty of a million": {"frequency_penalty": 1e6},
    "an empty model": {"model": ""},
    "a long model": {"model": "a" * 10_000},
    "a model in another folder": {"model": "../../etc/passwd"},
    "stream as text": {"stream": "yes"},
    "stream options without a stream": {"stream_options": {"include_usage": True}},
    "a long user": {"user": "a" * 10_000},
}

ENGINE_PRIVATE: dict[str, dict[str, Any]] = {
    "a chat template of nested loops": {
        "chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
    },
    "a chat template that multiplies": {"chat_template": '{{ "A" * 10**9 }}'},
    "arguments of the chat template": {"chat_template_kwargs": {"tokenize": True}},
    "a grammar of the engine": {"guided_grammar": "root ::= root root"},
    "a regular expression of the engine": {"guided_regex": "(a+)+$"},
    "structured outputs of the engine": {"structured_outputs": {"regex": "(a{1000}){1000}"}},
    "empty structured outputs": {"structured_outputs": {}},
    "prompt log probabilities": {"prompt_logprobs": 10**6},
    "a priority": {"priority": -(10**9)},
    "a cache salt": {"cache_salt": "of another tenant"},
    "arguments of the picture processor": {"mm_processor_kwargs": {"num_crops": 10**9}},
    "arguments of media loading": {"media_io_kwargs": {"video": {"num_frames": 10**9}}},
    "beam search": {"use_beam_search": True},
    "no end": {"ignore_eos": True},
    "allowed tokens": {"allowed_token_ids": list(range(100_000))},
    "bad words": {"bad_words": ["a"] * 100_000},
    "the engine's own request id": {"request_id": "mine"},
    "transfer of caches": {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "127.0.0.1"}},
    "documents for the template": {"documents": [{"a": "b"}]},
    "an extra body": {"extra_body": {"chat_template": "x"}},
    "a logits processor": {"logits_processors": ["os.system"]},
    "audio": {"modalities": ["audio"], "audio": {"voice": "alloy", "format": "wav"}},
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "a tool whose pattern never closes": {
        "tools": _tool(type="object", properties={"a": {"type": "string", "pattern": "("}})
    },
    "a tool of no type": {"tools": _tool(type="no such type")},
    "a tool whose type is a number": {"tools": _tool(type=7)},
    "a tool that refers elsewhere": {"tools": _tool(**{"$ref": "http://127.0.0.1:9/schema.json"})},
    "a tool with a bad name": {"tools": [{"type": "function", "function": {"name": "a b\n"}}]},
    "tools without number": {"tools": _tool(type="object") * 1000},
    "a choice of no tool": {"tool_choice": "required"},
    "an empty format": {"response_format": {}},
    "an unknown format": {"response_format": {"type": "grammar", "grammar": "root ::= root"}},
    "a schema format without a schema": _format(),
    "a schema format with an empty schema": _format(json_schema={}),
    "a schema that is none": _format(json_schema={"name": "a", "schema": {"type": "nothing"}}),
    "a schema whose pattern explodes": _format(
        json_schema={"name": "a", "schema": {"type": "string", "pattern": "(a{1000}){1000}" * 100}}
    ),
    "a key pattern that overflows": _format(
        json_schema={"name": "a", "schema": {"patternProperties": {"a{99999999999999999999}": {}}}}
    ),
    "a key pattern without end": _format(json_schema={"name": "a", "schema": {"patternProperties": {"(" * 3000: {}}}}),
    "a reference to elsewhere by another name": _format(
        json_schema={"name": "a", "schema": {"$dynamicRef": "http://127.0.0.1:9/schema.json"}}
    ),
    "a schema of ten thousand values": _format(
        json_schema={
            "name": "a",
            "schema": {"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(10_000)}},
        }
    ),
}


def _messages() -> dict[str, Any]:
    user = {"role": "user", "content": "hi"}
    return {
        "no messages": [],
        "messages that are text": "hi",
        "a hundred thousand messages": [user] * 100_000,
        "five megabytes of one message": [{"role": "user", "content": "a" * 5 * 2**20}],
        "ten megabytes of combining marks": [{"role": "user", "content": "e" + "\u0301" * (3 * 2**20)}],
        "half a surrogate pair": [{"role": "user", "content": "\ud800"}],
        "NUL": [{"role": "user", "content": "a\x00b"}],
        "an unknown role": [{"role": "root", "content": "hi"}],
        "content that is a number": [{"role": "user", "content": 7}],
        "no content": [{"role": "user"}],
        "a tool's answer to nobody": [user, {"role": "tool", "content": "x"}],
        "an unknown part": [{"role": "user", "content": [{"type": "prompt_embeds", "prompt_embeds": "gASV"}]}],
        "a tool call of a user": [{"role": "user", "content": "a", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}]}],
    }  # fmt: skip


def _pictures() -> dict[str, Any]:
    def of(url: str, **beside: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, **beside}}]}]

    return {
        "a picture of the metadata service": of("http://169.254.169.254/latest/meta-data/"),
        "a picture of this machine": of("http://127.0.0.1:8265/api/jobs/"),
        "a picture as a file": of("file:///etc/passwd"),
        "a picture that is text": of("data:text/html;base64,PGh0bWw+"),
        "a picture that is no base64": of("data:image/png;base64,!!!!"),
        "a picture that is none": of("data:image/png;base64,AAAA"),
        "a picture with sizes of its own": of("data:image/png;base64,AAAA", width=10**9),
        "a picture for who sees none": of(
            "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
        ),
    }


def _raw(model: str) -> dict[str, bytes]:
    start = b'{"model": "' + model.encode() + b'", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1'
    return {
        "NaN": start + b', "temperature": NaN}',
        "Infinity": start + b', "temperature": Infinity}',
        "a number of 100,000 digits": start + b', "seed": ' + b"9" * 100_000 + b"}",
        "a depth of 100,000": start + b', "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        "lists 100,000 deep": b"[" * 100_000,
        "a key twice": start + b', "max_tokens": 2}',
        "fifty thousand keys, the last one twice": (
            b"{" + b",".join(b'"k%d":0' % number for number in range(50_000)) + b',"k49999":1}'
        ),
        "no JSON": b"hello",
        "nothing": b"",
        "not UTF-8": start + b', "user": "\xff"}',
        "half of it": start,
        "a list": b"[]",
        "a byte order mark": b"\xef\xbb\xbf" + start + b"}",
    }
