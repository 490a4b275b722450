"""Who talks to a steward: two machines that prove to each other who they are; nobody between them reads or repeats.

**Greeting.** Each side makes a fresh X25519 key and signs, with the key that its blocks are signed with, which side it
is, both machines, both signing keys and both fresh keys: protocol SIG-DH of Canetti and Krawczyk (2001). The steward
proves itself first, the caller in its second message, and nothing is done for a caller before. What they share gives
two keys, for calls and for answers, which nobody can tell who later steals a signing key.

**Membership.** Whose signing key is whose the voters know, sealed (cluster/directory.py). Both sides ask them at each
greeting; a key that is not known there, or not any more, is refused. It is looked at again with each call, so a machine
that is expelled is refused by whoever has learned of that, and a caller greets anew after `SESSION_SECONDS`.

**Calls** are numbered, and sealed under their number (AES-256-GCM). Calls overtake each other; a number that was used,
or is older than the `OUTSTANDING` last ones, is refused: a repeated call is never done twice. The answer has the
number of its call. Only refusals are in the clear, and say nothing of what a steward has.
"""

import asyncio
import hashlib
import json
import logging
import pickle
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nexus import telemetry
from nexus.errors import NexusError, Unavailable, UpstreamInvalid, WriterUnknown

log = logging.getLogger("nexus.steward")

DOMAIN = b"nexus-channel-v1\0"
SESSION_SECONDS = 60.0  # after which a caller greets anew
KEPT_SECONDS = 600.0  # after which a steward takes no call of a session any more
SESSIONS = 512  # that a steward keeps, and greetings that wait for their second half
OUTSTANDING = 4_096  # calls of a session that may overtake each other
ID_BYTES, KEY_BYTES, NUMBER_BYTES = 16, 32, 12
GREET, ENTER, CALL = b"G", b"E", b"C"  # begin what is sent
ANSWER, AGAIN, REFUSED, LATER = b"A", b"N", b"R", b"L"  # begin what comes back
FIELDS = ("caller", "steward", "caller_key", "steward_key", "caller_share", "steward_share")

Handler = Callable[[str, str, tuple[object, ...]], Awaitable[Any]]  # (caller, method, arguments)


class Identity(Protocol):
    """What is used of a Keyring."""

    node: str
    fingerprint: str

    def sign(self, message: bytes) -> bytes: ...
    def verify_key(self, node: str, fingerprint: str) -> Ed25519PublicKey: ...


class Member(Protocol):
    """A machine that talks to others, and learns from the voters who they are."""

    async def identity(self) -> Identity:
        """Raises Unavailable where it takes no part, or not yet."""
        ...

    async def learn(self) -> None:
        """Raises Unavailable where the voters do not answer."""
        ...


class Wire(Protocol):
    """What carries messages to the steward of a machine, and answers back."""

    async def send(self, node: str, message: bytes, patience: str) -> bytes:
        """`patience` is the method that is asked for, by which it is waited. Raises ConnectionError."""
        ...


@dataclass(slots=True)
class _Session:
    """What two sides share after a greeting. `used` are the numbers at `lowest` or above that were taken."""

    id: bytes
    node: str  # the other side
    fingerprint: str
    calls: AESGCM
    answers: AESGCM
    began: float
    next_number: int = 0
    lowest: int = 0
    used: set[int] = field(default_factory=set)

    def seal(self, key: AESGCM, number: int, value: object) -> bytes:
        encoded = number.to_bytes(NUMBER_BYTES, "big")
        return encoded + key.encrypt(encoded, pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), self.id)

    def unseal(self, key: AESGCM, sealed: bytes) -> tuple[int, Any]:
        """Raises UpstreamInvalid for what the other side did not seal in this session."""
        encoded = sealed[:NUMBER_BYTES]
        try:
            plain = key.decrypt(encoded, sealed[NUMBER_BYTES:], self.id)
        except (InvalidTag, ValueError):
            raise UpstreamInvalid("a message between machines is damaged, or forged") from None
        return int.from_bytes(encoded, "big"), pickle.loads(plain)

    def take_number(self, number: int) -> None:
        """Raises UpstreamInvalid for one that was used, or is too old to know."""
        if number < self.lowest or number in self.used:
            raise UpstreamInvalid("a call between machines was repeated: it is not done again")
        self.used.add(number)
        if number >= self.lowest + OUTSTANDING:
            self.lowest = number - OUTSTANDING + 1
            self.used = {one for one in self.used if one >= self.lowest}


class Callers:
    """Asks stewards as a member: one session with each, greeted anew in time."""

    def __init__(self, member: Member, wire: Wire) -> None:
        self._member, self._wire = member, wire
        self._sessions: dict[str, _Session] = {}
        self._greeting: dict[str, asyncio.Lock] = {}

    async def call(self, node: str, method: str, *arguments: object) -> Any:
        """What the steward answers, or raises. Raises ConnectionError where it does not, Unavailable where it refuses.

        Raises WriterUnknown where what answers there is no member.
        """
        for _ in range(2):
            session = await self._session(node)
            number, session.next_number = session.next_number, session.next_number + 1
            sealed = session.seal(session.calls, number, (method, arguments))
            answer = await self._wire.send(node, CALL + session.id + sealed, method)
            if answer[:1] == ANSWER:
                return _result(session, number, answer[1:])
            self._forget(session)
            if answer[:1] != AGAIN:  # which says that it was not done: the steward began anew
                _checked(node, answer)
        raise ConnectionError(f"the steward of {node} does not keep a session")

    async def _session(self, node: str) -> _Session:
        async with self._greeting.setdefault(node, asyncio.Lock()):
            session, identity = self._sessions.get(node), await self._member.identity()
            if session is None or _time() - session.began > SESSION_SECONDS or not _is_member(identity, session):
                session = self._sessions[node] = await self._greet(node)
            return session

    def _forget(self, session: _Session) -> None:
        if self._sessions.get(session.node) is session:
            del self._sessions[session.node]

    async def _greet(self, node: str) -> _Session:
        identity, own = await self._member.identity(), X25519PrivateKey.generate()
        share = own.public_key().public_bytes_raw().hex()
        said = {"caller": identity.node, "caller_key": identity.fingerprint, "steward": node, "caller_share": share}
        answer = _checked(node, await self._wire.send(node, GREET + _encode(said), "greet"))
        told = _decode(answer, "steward_key", "steward_share", "signature")
        greeting = {**said, "steward_key": told["steward_key"], "steward_share": told["steward_share"]}
        await self._member.learn()
        _verify(identity, node, told["steward_key"], b"steward", greeting, told["signature"])
        session = _agree(own, told["steward_share"], greeting, node, told["steward_key"])
        proof = identity.sign(_signed(b"caller", greeting))
        _checked(node, await self._wire.send(node, ENTER + session.id + proof, "greet"))
        return session


def _result(session: _Session, number: int, sealed: bytes) -> Any:
    try:
        answered, (is_error, value) = session.unseal(session.answers, sealed)
    except UpstreamInvalid as error:
        raise ConnectionError(f"the answer of {session.node} is not its own: {error.message}") from None
    if answered != number:
        raise ConnectionError(f"the answer of {session.node} is to another call")
    if is_error:
        raise value
    return value


def _checked(node: str, answer: bytes) -> bytes:
    """What follows the mark of an answer. Raises ConnectionError and Unavailable."""
    mark, rest = answer[:1], answer[1:]
    if mark == ANSWER:
        return rest
    if mark == LATER:
        raise Unavailable(f"the steward of {node} takes no part yet; its log says why")
    if mark == REFUSED:
        raise Unavailable(f"the steward of {node} refuses this machine: {rest.decode(errors='replace')[:500]}")
    raise ConnectionError(f"the steward of {node} greets nobody")


class Gate:
    """The steward's side: lets in members, and nobody else."""

    def __init__(self, member: Member, handle: Handler) -> None:
        """`handle` does a call of a member; what NexusError it raises goes to the caller, sealed."""
        self._member, self._handle = member, handle
        self._waiting: OrderedDict[bytes, tuple[dict[str, str], _Session]] = OrderedDict()
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()

    async def answer(self, message: bytes) -> bytes:
        """To whatever anybody sends."""
        mark, rest = message[:1], message[1:]
        try:
            if mark == CALL:
                return await self._call(rest[:ID_BYTES], rest[ID_BYTES:])
            if mark == GREET:
                return ANSWER + await self._greet(_decode(rest, "caller", "caller_key", "caller_share", "steward"))
            if mark == ENTER:
                return await self._enter(rest[:ID_BYTES], rest[ID_BYTES:])
            raise UpstreamInvalid("another version of Nexus runs there")
        except Unavailable as error:
            log.warning("nobody can be let in: %s", error.message)
            return LATER
        except NexusError as error:
            log.warning("a caller was refused: %s", error.message)
            telemetry.callers_refused.labels(error.code).inc()
            return REFUSED + error.message.encode()

    async def _greet(self, said: dict[str, str]) -> bytes:
        identity, own = await self._member.identity(), X25519PrivateKey.generate()
        if said["steward"] != identity.node:
            raise UpstreamInvalid(f"this is the steward of {identity.node}")
        share = own.public_key().public_bytes_raw().hex()
        greeting = {**said, "steward_key": identity.fingerprint, "steward_share": share}
        session = _agree(own, greeting["caller_share"], greeting, said["caller"], said["caller_key"])
        _keep(self._waiting, session.id, (greeting, session))
        signature = identity.sign(_signed(b"steward", greeting)).hex()
        return _encode({"steward_key": identity.fingerprint, "steward_share": share, "signature": signature})

    async def _enter(self, id: bytes, proof: bytes) -> bytes:
        found = self._waiting.pop(id, None)
        if found is None:
            return AGAIN
        greeting, session = found
        await self._member.learn()
        _verify(await self._member.identity(), session.node, session.fingerprint, b"caller", greeting, proof.hex())
        _keep(self._sessions, id, session)
        return ANSWER

    async def _call(self, id: bytes, sealed: bytes) -> bytes:
        session = self._sessions.get(id)
        if session is None or _time() - session.began > KEPT_SECONDS:
            return AGAIN
        self._sessions.move_to_end(id)
        (await self._member.identity()).verify_key(session.node, session.fingerprint)
        number, (method, arguments) = session.unseal(session.calls, sealed)
        session.take_number(number)
        try:
            result = False, await self._handle(session.node, method, arguments)
        except NexusError as error:
            result = True, error
        return ANSWER + session.seal(session.answers, number, result)


def _keep(kept: "OrderedDict[bytes, Any]", id: bytes, value: object) -> None:
    kept[id] = value
    while len(kept) > SESSIONS:
        kept.popitem(last=False)


def _agree(own: X25519PrivateKey, theirs: str, greeting: dict[str, str], node: str, fingerprint: str) -> _Session:
    """Raises UpstreamInvalid for a fresh key that is none."""
    try:
        shared = own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(theirs)))
    except ValueError:
        raise UpstreamInvalid("a greeting has no key to agree by") from None
    about = hashlib.sha256(_signed(b"both", greeting)).digest()
    made = HKDF(hashes.SHA256(), ID_BYTES + 2 * KEY_BYTES, salt=about, info=DOMAIN).derive(shared)
    id, calls, answers = made[:ID_BYTES], made[ID_BYTES:-KEY_BYTES], made[-KEY_BYTES:]
    return _Session(id, node, fingerprint, AESGCM(calls), AESGCM(answers), _time())


def _is_member(identity: Identity, session: _Session) -> bool:
    """Whether the other side still is one, under the same key."""
    try:
        identity.verify_key(session.node, session.fingerprint)
    except WriterUnknown:
        return False
    return True


def _verify(
    identity: Identity, node: str, fingerprint: str, side: bytes, greeting: dict[str, str], signature: str
) -> None:  # fmt: skip
    """Raises WriterUnknown unless this member signed it."""
    try:
        identity.verify_key(node, fingerprint).verify(bytes.fromhex(signature), _signed(side, greeting))
    except (InvalidSignature, ValueError):
        raise WriterUnknown(f"what says to be {node} does not have its signing key") from None


def _signed(side: bytes, greeting: dict[str, str]) -> bytes:
    return DOMAIN + side + b"\0" + _encode({name: greeting[name] for name in FIELDS})


def _encode(values: dict[str, str]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _decode(message: bytes, *names: str) -> dict[str, str]:
    """The values of these names. Raises UpstreamInvalid for what is no greeting."""
    try:
        values = json.loads(message)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in names):
        raise UpstreamInvalid("a greeting cannot be read")
    return {name: values[name] for name in names}


def _time() -> float:
    return asyncio.get_running_loop().time()
