"""The response cache: what is kept, for whom, how long, and that no other prompt ever gets it."""

import asyncio
import pickle
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from nexus.cache import CachedGenerator, Completer, ResponseCache, is_whole, key_of
from nexus.errors import Unavailable
from nexus.types import Delta, Hit, Image, Message, Prompt, RouteScore, Usage

END = Delta(finish_reason="stop")
SAID = [Delta("Paris", beside={"logprobs": {"content": [1, 2.5]}}), END, Delta(usage=Usage(9, 1))]
ASK = Prompt((Message("user", "what is the capital of France?"),), tenant="t", sequence=7)


class Teller:
    """A generator that says the same again and counts how often it was asked, and broke off."""

    def __init__(self, said: Sequence[Delta | Exception] = SAID, name: str = "teller") -> None:
        self.name = name
        self.sees_images = True
        self.said = said
        self.asked = 0
        self.closed = 0

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        self.asked += 1
        try:
            for one in self.said:
                if isinstance(one, Exception):
                    raise one
                yield one
        finally:
            self.closed += 1

    async def check(self) -> None:
        raise Unavailable("asked for its health")


class Whole(Teller):
    """A generator with its own way to a whole generation."""

    async def complete(self, prompt: Prompt) -> list[Delta]:
        self.asked += 1
        return [Delta("whole"), *(one for one in self.said if isinstance(one, Delta))]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def cache_of(entries: int = 10, seconds: float = 60.0, max_bytes: int = 10_000) -> tuple[ResponseCache, Clock]:
    clock = Clock()
    return ResponseCache(entries, seconds, max_bytes, clock), clock


async def take(generator: Teller | CachedGenerator, prompt: Prompt = ASK) -> list[Delta]:
    async with aclosing(generator.stream(prompt)) as deltas:
        return [delta async for delta in deltas]


def ask(generator: CachedGenerator, prompt: Prompt = ASK) -> list[Delta]:
    return asyncio.run(take(generator, prompt))


def test_a_hit_says_the_same_again_usage_included() -> None:
    teller = Teller()
    generator = CachedGenerator(teller, cache_of()[0])
    assert (generator.name, generator.sees_images) == ("teller", True)
    assert ask(generator) == ask(generator) == asyncio.run(generator.complete(deepcopy(ASK))) == SAID
    assert teller.asked == 1


def test_a_hit_is_a_copy_that_may_be_changed() -> None:
    generator = CachedGenerator(Teller(), cache_of()[0])
    ask(generator)
    ask(generator)[0].beside["logprobs"]["content"].clear()  # type: ignore[index]
    assert ask(generator) == SAID


def test_deltas_come_as_they_are_made() -> None:
    async def go() -> None:
        teller = Teller([Delta("first"), Unavailable("later")])
        async with aclosing(CachedGenerator(teller, cache_of()[0]).stream(ASK)) as deltas:
            assert await anext(deltas) == Delta("first")

    asyncio.run(go())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        [],
        [Delta("half")],
        [Delta("half"), Unavailable("gone")],
        [Delta("x"), END, Unavailable("gone")],
        [Delta("x"), END, Delta("y", choice=1)],
        [Delta("x", choice=1), Delta(choice=1, finish_reason="stop"), Delta("y")],
    ],
)
def test_what_has_not_ended_is_not_kept(said: list[Delta | Exception], whole: bool) -> None:
    teller = Teller(said)
    generator = CachedGenerator(teller, cache_of()[0])
    for _ in range(2):
        with suppress(Unavailable):
            asyncio.run(generator.complete(ASK)) if whole else ask(generator)
    assert teller.asked == 2


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_what_was_abandoned_is_not_kept_and_the_generator_is_closed_at_once(taken: int) -> None:
    async def go() -> None:
        teller = Teller()
        generator = CachedGenerator(teller, cache_of()[0])
        deltas = generator.stream(ASK)
        for _ in range(taken):
            await anext(deltas)
        assert teller.closed == 0
        await deltas.aclose()
        assert teller.closed == 1
        assert await take(generator) == SAID
        assert teller.asked == 2

    asyncio.run(go())


def test_each_choice_that_was_asked_for_must_have_ended() -> None:
    two = replace(ASK, options={"n": 2})
    first, second = Delta(choice=0, finish_reason="stop"), Delta(choice=1, finish_reason="length")
    assert is_whole(two, [first, second])
    assert not is_whole(two, [first])
    assert not is_whole(two, [second, second])
    assert not is_whole(two, [first, second, Delta("more", choice=2)])
    assert is_whole(replace(ASK, options={"n": None}), [first])


def test_a_generator_with_its_own_way_to_the_whole_is_asked_that_way() -> None:
    teller = Whole()
    generator = CachedGenerator(teller, cache_of()[0])
    assert isinstance(generator, Completer)
    for _ in range(2):
        assert asyncio.run(generator.complete(ASK)) == [Delta("whole"), *SAID]
    assert ask(generator) == [Delta("whole"), *SAID]
    assert teller.asked == 1
    teller.said = []
    assert asyncio.run(generator.complete(replace(ASK, seed=1))) == [Delta("whole")]
    assert asyncio.run(generator.complete(replace(ASK, seed=1))) == [Delta("whole")]
    assert teller.asked == 3


def test_a_check_is_passed_on() -> None:
    with pytest.raises(Unavailable, match="health"):
        asyncio.run(CachedGenerator(Teller(), cache_of()[0]).check())


def test_models_and_variants_that_share_a_cache_do_not_share_answers() -> None:
    cache, _ = cache_of()
    tellers = [Teller(), Teller(name="other"), Teller()]
    for teller, variant in zip(tellers, ("", "", "fast"), strict=True):
        ask(CachedGenerator(teller, cache, variant))
        ask(CachedGenerator(teller, cache, variant))
    assert [teller.asked for teller in tellers] == [1, 1, 1]


# Bounds


def test_what_is_old_is_gone() -> None:
    cache, clock = cache_of(seconds=60.0)
    cache.put("a", SAID)
    clock.now = 59.9
    assert cache.get("a") == SAID  # which does not make it younger
    clock.now = 60.0
    assert cache.get("a") is None


def test_the_least_recently_used_goes_first() -> None:
    cache, _ = cache_of(entries=2)
    cache.put("a", SAID)
    cache.put("b", SAID)
    cache.get("a")
    cache.put("c", SAID)
    assert [key for key in "abc" if cache.get(key)] == ["a", "c"]
    cache.put("c", SAID)
    assert [key for key in "abc" if cache.get(key)] == ["a", "c"]


def test_a_cache_of_nothing_keeps_nothing() -> None:
    cache, _ = cache_of(entries=0)
    cache.put("a", SAID)
    assert cache.get("a") is None


def test_what_is_too_large_is_not_kept_and_drives_nothing_out() -> None:
    cache, _ = cache_of(max_bytes=1000)
    cache.put("a", SAID)
    cache.put("b", [Delta("x" * 1000), END])
    assert (cache.get("a"), cache.get("b")) == (SAID, None)


@settings(max_examples=60, deadline=None)
@given(
    some.integers(1, 5), some.integers(50, 2000),
    some.lists(some.tuples(some.sampled_from("abcdefgh"), some.integers(0, 900), some.sampled_from([0.0, 1.0, 30.0]))),
)  # fmt: skip
def test_the_bounds_hold_and_nobody_gets_anything_but_the_last_put(
    entries: int, max_bytes: int, puts: list[tuple[str, int, float]]
) -> None:
    cache, clock = cache_of(entries, 60.0, max_bytes)
    latest: dict[str, tuple[float, list[Delta]]] = {}
    for number, (key, size, later) in enumerate(puts):
        clock.now += later
        latest[key] = (clock.now, [Delta(f"{number} {'x' * size}"), END])
        cache.put(key, latest[key][1])
        kept = {name: found for name in latest if (found := cache.get(name)) is not None}
        assert len(kept) <= entries
        assert sum(len(pickle.dumps(found)) for found in kept.values()) <= max_bytes
        for name, found in kept.items():
            assert clock.now - latest[name][0] < 60.0
            assert found == latest[name][1] or len(pickle.dumps(latest[name][1])) > max_bytes
        assert key in kept or len(pickle.dumps(latest[key][1])) > max_bytes


# Keys

HIT = Hit("c", "d", "v", 0, 0.5, 0.5, "text", "title", "s", (), None, None, None, {})
few = settings(max_examples=25, deadline=None)
words = some.text(max_size=4)
numbers = some.none() | some.integers(-2, 2)
json = some.recursive(
    some.none() | some.booleans() | some.integers(-2, 2) | some.floats(-2, 2) | words,
    lambda inner: some.lists(inner, max_size=2) | some.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
objects = some.dictionaries(words, json, max_size=2)
images = some.builds(Image, words)
FIELDS: dict[type, dict[str, some.SearchStrategy[Any]]] = {
    Image: {"url": words},
    Message: {
        "role": some.sampled_from(["system", "user", "assistant", "tool"]),
        "content": words | some.lists(words | images, max_size=3).map(tuple),
        "tool_calls": some.lists(objects, max_size=2).map(tuple),
        "tool_call_id": some.none() | words,
    },
    Hit: {
        **dict.fromkeys(("chunk_id", "document_id", "version", "cut", "text", "title", "source"), words),
        **dict.fromkeys(("page", "first_line", "last_line"), numbers),
        "ordinal": some.integers(0, 3), "heading": some.lists(words, max_size=2).map(tuple), "metadata": objects,
        **dict.fromkeys(("readers", "flags"), some.lists(words, max_size=2).map(tuple)),
    },
}  # fmt: skip
FOUND: dict[str, some.SearchStrategy[Any]] = {
    "score": some.floats(0, 1), "cosine": some.floats(0, 1),
    "routes": some.dictionaries(words, some.builds(RouteScore, some.integers(1, 3), some.floats(0, 1)), max_size=1),
}  # fmt: skip
hits = some.builds(Hit, **FIELDS[Hit], **FOUND)
FIELDS[Prompt] = {
    "messages": some.lists(some.builds(Message, **FIELDS[Message]), max_size=2).map(tuple),
    "passages": some.lists(hits, max_size=2).map(tuple),
    "temperature": some.none() | some.floats(0, 2),
    "stop": some.lists(words, max_size=2).map(tuple),
    "options": objects, "text": some.none() | words,
    **dict.fromkeys(("question", "session", "tenant"), words),
    **dict.fromkeys(("max_tokens", "seed", "sequence"), numbers),
}  # fmt: skip
prompts = some.builds(Prompt, **FIELDS[Prompt])


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_every_field_is_varied_here(kind: type) -> None:
    """A new field of a prompt, or of what it holds, comes into the tests below, and so into the key."""
    assert {one.name for one in fields(kind)} == FIELDS[kind].keys() | (FOUND.keys() if kind is Hit else set())


@pytest.mark.parametrize("name", FIELDS[Prompt])
@few
@given(data=some.data())
def test_prompts_that_differ_in_one_field_have_different_keys(name: str, data: some.DataObject) -> None:
    prompt, other = (replace(ASK, **{name: data.draw(FIELDS[Prompt][name])}) for _ in range(2))
    assume(without_scores(other) != without_scores(prompt))
    assert key_of("m", prompt) != key_of("m", other)


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in (Image, Message, Hit) for name in FIELDS[kind]])
@few
@given(data=some.data())
def test_so_have_prompts_that_differ_within(kind: type, name: str, data: some.DataObject) -> None:
    plain = {Image: Image(""), Message: Message("user", ""), Hit: HIT}[kind]
    one, other = (replace(plain, **{name: data.draw(FIELDS[kind][name])}) for _ in range(2))
    assume(one != other)

    def hold(value: Any) -> Prompt:
        if isinstance(value, Hit):
            return Prompt((), passages=(value,))
        return Prompt((value if isinstance(value, Message) else Message("user", (value,)),))

    assert key_of("m", hold(one)) != key_of("m", hold(other))


@settings(max_examples=50, deadline=None)
@given(prompts, prompts)
def test_any_two_prompts_have_different_keys_and_equal_ones_the_same(one: Prompt, other: Prompt) -> None:
    assert key_of("m", one) == key_of("m", deepcopy(one))
    if without_scores(one) != without_scores(other):
        assert key_of("m", one) != key_of("m", other)


@few
@given(some.fixed_dictionaries(FOUND))
def test_how_well_a_passage_was_found_does_not_matter(found: dict[str, Any]) -> None:
    assert key_of("m", Prompt((), passages=(HIT,))) == key_of("m", Prompt((), passages=(replace(HIT, **found),)))


@pytest.mark.parametrize(
    "one, other",
    [
        (Prompt((), options={"a": 1}), Prompt((), options={"a": True})),
        (Prompt((), options={"a": 1}), Prompt((), options={"a": "1"})),
        (Prompt((), options={"a": {"x": 1, "y": 1}}), Prompt((), options={"a": {"y": 1, "x": 1}})),
        (Prompt((Message("user", "a', role='b"),)), Prompt((Message("user", "a"), Message("user", "b")))),
        (Prompt((), text="\ud800"), Prompt((), text="\\ud800")),
        (Prompt((Message("user", ("x",)),)), Prompt((Message("user", "x"),))),
        (Prompt((Message("user", ("http://x",)),)), Prompt((Message("user", (Image("http://x"),)),))),
    ],
)
def test_what_looks_alike_is_told_apart(one: Prompt, other: Prompt) -> None:
    assert key_of("m", one) != key_of("m", other)


def test_name_and_variant_do_not_run_together() -> None:
    assert key_of("ab", ASK, "c") != key_of("a", ASK, "bc")


def without_scores(prompt: Prompt) -> Prompt:
    return replace(prompt, passages=tuple(replace(hit, score=0, cosine=0, routes={}) for hit in prompt.passages))
