"""Row K8 of the cryptography for blocks: who asks a steward proves to be a member, and so does the steward.

In one process, on real keys, with a catalog in place of the voters; test_stewards.py asks real actors.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cluster import channel
from cluster.alone import AloneVoters
from cluster.channel import AGAIN, ANSWER, CALL, ENTER, GREET, LATER, OUTSTANDING, REFUSED, Callers, Gate
from cluster.directory import NODES as INTRODUCED
from cluster.directory import Directory
from cluster.membership import FrontDoor
from nexus import telemetry
from nexus.errors import Conflict, Unavailable, WriterUnknown
from nexus.keyring import Keyring
from tests.stewards import CLUSTER_KEY

Interfere = Callable[[str, bytes], Coroutine[Any, Any, bytes | None]]


@dataclass
class World:
    """Machines with keys that the voters know, a gate on one of them, and a wire that shows all it carries."""

    folder: Path
    directory: Directory = field(default_factory=lambda: Directory(AloneVoters()))
    gates: dict[str, Gate] = field(default_factory=dict)
    done: list[tuple[str, str, tuple[object, ...]]] = field(default_factory=list)
    carried: list[bytes] = field(default_factory=list)
    is_silent: bool = False

    def member(self, node: str, secret: str = CLUSTER_KEY, home: str | None = None) -> FrontDoor:
        folder = self.folder / (home or node)
        folder.mkdir(mode=0o700, exist_ok=True)
        return FrontDoor(lambda: Keyring(folder, node, secret, keeps=False), self.directory, self)

    async def open(self, node: str) -> FrontDoor:
        member = self.member(node)
        await member.identity()
        self.gates[node] = Gate(member, self._do)
        return member

    async def _do(self, caller: str, method: str, arguments: tuple[object, ...]) -> object:
        self.done.append((caller, method, arguments))
        if method == "fail":
            raise Conflict("as it was told")
        return arguments

    async def send(self, node: str, message: bytes, patience: str) -> bytes:
        answer = await self.gates[node].answer(message)
        self.carried += [message, answer]
        if self.is_silent:
            raise ConnectionError("the answer is lost")
        return answer

    async def remove(self, node: str) -> None:
        """By another member's record, as the voters have it then."""
        other = await self.member("tron").identity()
        found = await self.directory.voters.get(f"{INTRODUCED}{node}")
        assert found is not None
        other.meet(found[0])
        await self.directory.voters.put(f"{INTRODUCED}{node}", other.removal(node))


@pytest.fixture
def tell(tmp_path: Path) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]:
    """Run a story with a steward on clu and a caller on sark."""

    def run(story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def all_of_it() -> None:
            world = World(tmp_path)
            await world.open("clu")
            await story(world)

        asyncio.run(all_of_it())

    return run


Tell = Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]


def test_a_member_is_answered_by_name_and_gets_what_the_steward_raises(tell: Tell) -> None:
    async def story(world: World) -> None:
        callers = Callers(world.member("sark"), world)
        assert await callers.call("clu", "give", 1, b"two") == (1, b"two")
        with pytest.raises(Conflict, match="as it was told"):
            await callers.call("clu", "fail")
        assert [(caller, method) for caller, method, _ in world.done] == [("sark", "give"), ("sark", "fail")]

    tell(story)


def test_nothing_that_is_said_can_be_read_on_the_way(tell: Tell) -> None:
    async def story(world: World) -> None:
        canary = b"canary-4711" * 1000
        callers = Callers(world.member("sark"), world)
        assert await callers.call("clu", "append", canary, "metadata-4712") == (canary, "metadata-4712")
        assert len(world.carried) == 6 and any(len(one) > len(canary) for one in world.carried)
        for one in world.carried:
            assert b"4711" not in one and b"4712" not in one and b"append" not in one

    tell(story)


# Who is refused


def refused() -> float:
    """How many callers were, as `/metrics` counts them."""
    (family,) = telemetry.callers_refused.collect()
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


@pytest.mark.parametrize(
    "message",
    [b"", b"begin", b"\0" * 99, GREET, GREET + b"{}", GREET + b"[" * 100_000, ENTER, CALL, ENTER + b"x" * 80,
     CALL + b"x" * 80, GREET + b'{"caller": "sark", "caller_key": 1, "caller_share": "", "steward": "clu"}',
     GREET + b'{"caller": "sark", "caller_key": "", "caller_share": "zz", "steward": "clu"}',
     GREET + b'{"caller": "sark", "caller_key": "", "caller_share": "' + b"0" * 64 + b'", "steward": "clu"}'],
)  # fmt: skip
def test_who_has_no_key_is_answered_nothing(tell: Tell, message: bytes) -> None:
    """As whoever has the cluster's token alone; a share of zeros would make a secret that everybody knows."""

    async def story(world: World) -> None:
        before = refused()
        mark = (await world.gates["clu"].answer(message))[:1]
        assert mark in (REFUSED, AGAIN) and refused() - before == (mark == REFUSED)
        assert world.done == []

    tell(story)


def test_who_has_another_key_than_it_says_is_refused(tell: Tell) -> None:
    """It knows the cluster's token and names a member's key; or its own, which no member introduced."""

    async def story(world: World) -> None:
        honest = await world.member("sark").identity()
        for names in ("its own", "the member's"):
            thief = Keyring(_made(world.folder / names), "sark", CLUSTER_KEY)
            thief.meet(next(iter(await world.directory.voters.range(INTRODUCED)))[1])
            if names == "the member's":
                thief.fingerprint = honest.fingerprint
            with pytest.raises(Unavailable, match=r"refuses this machine.*(no machine sark|does not have its)"):
                await Callers(_Fixed(thief), world).call("clu", "give")
        assert world.done == []

    tell(story)


def test_who_has_another_cluster_key_is_refused_although_it_introduced_itself(tell: Tell) -> None:
    async def story(world: World) -> None:
        mallory = world.member("mallory", "Zq8Lw3Xn5Vb7Rt2Yp9Kc4Md6Hs1Jf0GuE8aT5iB3oW7")
        stranger = await mallory.identity()
        with pytest.raises(WriterUnknown):  # nor does it know the steward
            await Callers(mallory, world).call("clu", "give")
        before = refused()
        with pytest.raises(Unavailable, match="no machine mallory"):
            await Callers(_Credulous(stranger, await world.member("tron").identity()), world).call("clu", "give")
        assert world.done == [] and refused() == before + 1

    tell(story)


def test_a_member_that_was_removed_is_refused_at_once_and_at_its_next_greeting(tell: Tell) -> None:
    async def story(world: World) -> None:
        member = world.member("sark")
        callers = Callers(member, world)
        await callers.call("clu", "before")
        await world.remove("sark")
        await world.gates["clu"]._member.learn()
        with pytest.raises(Unavailable, match="refuses this machine: machine sark was removed"):
            await callers.call("clu", "in its session")
        with pytest.raises(Unavailable, match="refuses this machine: machine sark was removed"):
            await Callers(_Fixed(await member.identity()), world).call("clu", "in another")
        assert [method for _, method, _ in world.done] == ["before"]

    tell(story)


def test_a_removed_member_is_refused_by_a_steward_that_has_not_heard_of_it(tell: Tell) -> None:
    """The voters are asked at each greeting."""

    async def story(world: World) -> None:
        identity = await world.member("sark").identity()
        identity.meet((await world.member("clu").identity()).introduction())
        await world.remove("sark")
        with pytest.raises(Unavailable, match="machine sark was removed"):
            await Callers(_Fixed(identity), world).call("clu", "give")
        assert world.done == []

    tell(story)


def test_a_steward_that_is_none_or_is_removed_is_told_nothing(tell: Tell) -> None:
    async def story(world: World) -> None:
        canary = "canary-4713"
        world.gates["tron"] = Gate(world.member("tron", home="an impostor's", secret=CLUSTER_KEY), world._do)
        impostor = await world.gates["tron"]._member.identity()
        await world.directory.voters.delete(f"{INTRODUCED}tron")
        with pytest.raises(WriterUnknown):
            await Callers(world.member("sark"), world).call("tron", "append", canary)
        world.gates["ram"] = Gate(_Fixed(impostor), world._do)
        with pytest.raises(Unavailable, match="this is the steward of tron"):
            await Callers(world.member("sark"), world).call("ram", "append", canary)
        callers = Callers(world.member("sark"), world)
        await callers.call("clu", "before")
        await world.remove("clu")
        await callers._member.learn()
        with pytest.raises(WriterUnknown, match="machine clu was removed"):
            await callers.call("clu", "append", canary)
        assert [method for _, method, _ in world.done] == ["before"]

    tell(story)


def test_without_the_voters_nobody_is_let_in(tell: Tell) -> None:
    async def story(world: World) -> None:
        member = await _known(world, "sark")
        gate = Gate(_Lonely(await world.member("clu").identity()), world._do)
        world.gates["clu"] = gate
        with pytest.raises(Unavailable):
            await Callers(member, world).call("clu", "give")
        assert world.done == [] and world.carried[-1] == LATER

    tell(story)


# Who is between


def test_a_repeated_call_is_not_done_again(tell: Tell) -> None:
    async def story(world: World) -> None:
        callers = Callers(world.member("sark"), world)
        await callers.call("clu", "one")
        await callers.call("clu", "two")
        greeting, entering, first, second = world.carried[::2]
        for message in (first, second, first):
            answer = await world.gates["clu"].answer(message)
            assert answer[:1] == REFUSED and b"repeated" in answer
        assert (await world.gates["clu"].answer(entering))[:1] == AGAIN
        again = await world.gates["clu"].answer(greeting)  # which makes another session, that only sark could enter
        assert again != world.carried[1] and (await world.gates["clu"].answer(entering))[:1] == AGAIN
        await world.open("clu")
        assert (await world.gates["clu"].answer(first))[:1] == AGAIN, "also after a steward began anew"
        await world.open("tron")
        assert (await world.gates["tron"].answer(first))[:1] == AGAIN
        assert [method for _, method, _ in world.done] == ["one", "two"]

    tell(story)


def test_a_call_whose_answer_was_lost_is_not_repeated_by_the_caller(tell: Tell) -> None:
    async def story(world: World) -> None:
        callers = Callers(world.member("sark"), world)
        await callers.call("clu", "one")
        world.is_silent = True
        with pytest.raises(ConnectionError):
            await callers.call("clu", "two")
        assert [method for _, method, _ in world.done] == ["one", "two"]

    tell(story)


def test_every_changed_bit_is_noticed(tell: Tell) -> None:
    async def story(world: World) -> None:
        callers = Callers(world.member("sark"), world)
        await callers.call("clu", "one")
        session = callers._sessions["clu"]
        sealed = CALL + session.id + session.seal(session.calls, 7, ("two", ()))
        for place in range(len(sealed)):
            for bit in range(8):
                spoilt = bytearray(sealed)
                spoilt[place] ^= 1 << bit
                assert (await world.gates["clu"].answer(bytes(spoilt)))[:1] in (REFUSED, AGAIN), (place, bit)
        assert [method for _, method, _ in world.done] == ["one"]
        assert (await world.gates["clu"].answer(sealed))[:1] == ANSWER, "a spoilt one uses no number up"

    tell(story)


@pytest.mark.parametrize("message", range(4))
def test_a_greeting_that_was_changed_leads_nowhere(tell: Tell, message: int) -> None:
    """The caller's, the steward's answer, the caller's proof, and the steward's last word."""

    async def story(world: World) -> None:
        class Meddler:
            at = 0

            def spoil(self, passing: bytes) -> bytes:
                self.at += 1
                if self.at - 1 != message:
                    return passing
                place = passing.rfind(b"_share") + 12 if b"_share" in passing else len(passing) - 1
                return passing[:place] + bytes([passing[place] ^ 1]) + passing[place + 1 :]

            async def send(self, node: str, message: bytes, patience: str) -> bytes:
                return self.spoil(await world.send(node, self.spoil(message), patience))

        with pytest.raises((ConnectionError, Unavailable, WriterUnknown)):
            await Callers(world.member("sark"), Meddler()).call("clu", "give")
        assert world.done == []

    tell(story)


def test_nobody_in_the_middle_passes_for_either(tell: Tell) -> None:
    """A member that answers in another's name, and hands on what it is asked; or shows a caller its own words."""

    async def story(world: World) -> None:
        await world.open("tron")

        class Relay:
            async def send(self, node: str, message: bytes, patience: str) -> bytes:
                return await world.send("tron", message.replace(b'"steward":"clu"', b'"steward":"tron"'), patience)

        with pytest.raises(WriterUnknown):
            await Callers(world.member("sark"), Relay()).call("clu", "give")
        assert world.done == []

    tell(story)


def test_a_steward_is_not_entered_with_its_own_proof(tell: Tell) -> None:
    """Who greets it in its own name, as its machine's front door does, and shows it what it signed itself."""

    async def story(world: World) -> None:
        clu, thief = await world.member("clu").identity(), X25519PrivateKey.generate()
        share = thief.public_key().public_bytes_raw().hex()
        said = {"caller": "clu", "caller_key": clu.fingerprint, "caller_share": share, "steward": "clu"}
        told = json.loads((await world.gates["clu"].answer(GREET + json.dumps(said).encode()))[1:])
        greeting = {**said, **told}
        session = channel._agree(thief, told["steward_share"], greeting, "clu", clu.fingerprint)
        proof = bytes.fromhex(told["signature"])
        assert (await world.gates["clu"].answer(ENTER + session.id + proof))[:1] == REFUSED
        assert (await world.gates["clu"].answer(CALL + session.id + session.seal(session.calls, 0, ("x", ())))) == AGAIN
        assert world.done == []

    tell(story)


def test_an_answer_to_one_call_is_none_to_another(tell: Tell) -> None:
    async def story(world: World) -> None:
        kept: list[bytes] = []

        class Swap:
            async def send(self, node: str, message: bytes, patience: str) -> bytes:
                answer = await world.send(node, message, patience)
                if patience == "give":
                    kept.append(answer)
                return kept[0] if patience == "give" else answer

        callers = Callers(world.member("sark"), Swap())
        assert await callers.call("clu", "give", 1) == (1,)
        with pytest.raises(ConnectionError, match="to another call"):
            await callers.call("clu", "give", 2)

    tell(story)


# Sessions


def test_a_steward_that_began_anew_is_greeted_again(tell: Tell) -> None:
    async def story(world: World) -> None:
        callers = Callers(world.member("sark"), world)
        await callers.call("clu", "one")
        await world.open("clu")
        assert await callers.call("clu", "two", 2) == (2,)
        await asyncio.gather(*(callers.call("clu", "more") for _ in range(20)))
        assert sum(one[:1] == GREET for one in world.carried) == 2

    tell(story)


def test_a_session_ends_by_itself(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        now = [0.0]
        monkeypatch.setattr(channel, "_time", lambda: now[0])
        callers = Callers(world.member("sark"), world)
        await callers.call("clu", "one")
        now[0] = channel.SESSION_SECONDS
        await callers.call("clu", "two")
        assert sum(one[:1] == GREET for one in world.carried) == 1
        now[0] += 1
        await callers.call("clu", "three")
        assert sum(one[:1] == GREET for one in world.carried) == 2
        session = callers._sessions["clu"]
        late = CALL + session.id + session.seal(session.calls, 9, ("late", ()))
        now[0] += channel.KEPT_SECONDS + 1
        assert await world.gates["clu"].answer(late) == AGAIN

    tell(story)


def test_calls_may_overtake_each_other_but_not_for_ever(tell: Tell) -> None:
    async def story(world: World) -> None:
        callers = Callers(world.member("sark"), world)
        await callers.call("clu", "one")
        session = callers._sessions["clu"]

        async def ask(number: int) -> bytes:
            message = CALL + session.id + session.seal(session.calls, number, ("give", ()))
            return (await world.gates["clu"].answer(message))[:1]

        assert [await ask(number) for number in (5, 3, 4, 3, 5)] == [ANSWER, ANSWER, ANSWER, REFUSED, REFUSED]
        assert [await ask(number) for number in (5 + OUTSTANDING, 5, 6, 6)] == [ANSWER, REFUSED, ANSWER, REFUSED]

    tell(story)


def test_greetings_that_nobody_ends_are_bounded(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "SESSIONS", 8)

    async def story(world: World) -> None:
        callers = Callers(world.member("sark"), world)
        await callers.call("clu", "one")
        for _ in range(20):
            await world.gates["clu"].answer(world.carried[0])
        assert len(world.gates["clu"]._waiting) == 8
        assert await callers.call("clu", "two", 2) == (2,)

    tell(story)


# Members as they should not be


@dataclass
class _Fixed:
    """Keys as they are; it hears nothing of the voters."""

    keyring: Keyring

    async def identity(self) -> Keyring:
        return self.keyring

    async def learn(self) -> None:
        """It does not."""


class _Lonely(_Fixed):
    async def learn(self) -> None:
        raise Unavailable("the voters do not answer")


@dataclass
class _Credulous(_Fixed):
    """Signs as one, and takes from another who the others are."""

    known: Keyring

    def __init__(self, keyring: Keyring, known: Keyring) -> None:
        keyring.verify_key = known.verify_key  # type: ignore[method-assign]
        super().__init__(keyring)
        self.known = known
        known.meet(known.introduction())

    async def learn(self) -> None:
        self.keyring.verify_key = _anybody  # type: ignore[method-assign]


def _anybody(node: str, fingerprint: str) -> Any:
    class Key:
        def verify(self, signature: bytes, message: bytes) -> None:
            """Believes it."""

    return Key()


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


async def _known(world: World, node: str) -> FrontDoor:
    member = world.member(node)
    await member.learn()
    return member
