"""Short-lived JWTs (RFC 7519, RFC 9068): made of a key here, or by an issuer that the settings name.

Which keys and algorithms count is a matter of the issuer and of nothing that a token says of itself: our own are
HS256 with the home's secret, an outside issuer's are signed with public keys, and the two are never looked for in one
list (RFC 8725, 3.1). A token is taken apart strictly before anything of it is believed: three parts of unpadded
canonical base64url, JSON that names nothing twice, a header of known members, claims of the right types.

A token of ours names the key that it was made of (`key`) and is worth what that key still is: it ends with it, and its
limits are the key's. One of an outside issuer has `tenant` and `permissions` (or `scope`), and no more than its issuer
may give. Whatever is wrong, the answer is the same; the refusal's cause is for the record.
"""

import base64
import binascii
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jwt

from nexus.access import KeyRing, check_permissions
from nexus.config import Access, Issuer
from nexus.errors import Forbidden, InvalidRequest, Unauthenticated
from nexus.key_sets import KeySet, open_key_set
from nexus.signing import SecretFile
from nexus.types import Principal

MOST_CHARACTERS = 8192
MOST_NAME = 255  # characters of a subject or a token's id
MOST_TIME = 2**53
LEEWAY_SECONDS = 10.0
OURS = "HS256"
OUR_TYPE = "at+jwt"  # RFC 9068, 2.1
REQUIRED = ["exp", "iat", "iss", "aud", "sub", "jti"]
FORM = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)
HEADER = frozenset({"alg", "typ", "kid", "x5t", "x5t#S256"})  # what may be there; the last two mean nothing here
TYPES = frozenset({None, "jwt", "at+jwt", "application/at+jwt"})
USES = frozenset({"access", "bearer"})  # of the claims by which issuers tell access tokens from others


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was verified or made: whose it is, and how it can be revoked. Times are Unix seconds."""

    principal: Principal
    issuer: str
    id: str
    issued_at: int
    expires_at: int


class _Refused(Exception):
    """What is wrong with a token, for the record."""


@dataclass(frozen=True)
class _Parsed:
    """A token taken apart; nothing of it is true yet."""

    header: Mapping[str, Any]
    claims: Mapping[str, Any]


@dataclass(frozen=True)
class _Outside:
    settings: Issuer
    key_set: KeySet = field(repr=False)


class Tokens:
    """Makes and verifies the tokens of one installation."""

    def __init__(
        self, keys: KeyRing, home: Path, settings: Access,
        open_keys: Callable[[Issuer], KeySet] = open_key_set, now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """Raises ConfigError for a secret or a key set that is no good."""
        self._keys, self._settings, self._now = keys, settings, now
        given = settings.token_secret
        self._secret: Callable[[], bytes] = SecretFile(home).read if given is None else given.get_secret_value().encode
        self._outside = {each.issuer: _Outside(each, open_keys(each)) for each in settings.issuers}

    def issue(
        self, principal: Principal, permissions: frozenset[str] | None = None, lifetime_seconds: float | None = None
    ) -> tuple[str, Token]:
        """A token for the owner of a key, with no more permissions and for no longer than allowed.

        Raises InvalidRequest, Forbidden.
        """
        most = self._settings.token_seconds
        lifetime = min(900.0, most) if lifetime_seconds is None else lifetime_seconds
        if not 1 <= lifetime <= most:
            raise InvalidRequest(f"a token lives for 1 to {most:g} seconds", pointer="/lifetime_seconds")
        given = principal.permissions if permissions is None else permissions
        check_permissions(given)
        if excess := given - principal.permissions:
            raise Forbidden(f"this key has no permission {sorted(excess)[0]!r} to give")
        if self._keys.standing(principal.credential) is None:
            raise Forbidden("a token is made with a key")
        begin = int(self._now())
        token_id = secrets.token_urlsafe(18)
        claims = {
            "iss": self._settings.issuer, "aud": self._settings.audience, "sub": principal.subject, "jti": token_id,
            "iat": begin, "nbf": begin, "exp": begin + int(lifetime), "tenant": principal.tenant,
            "permissions": sorted(given), "key": principal.credential,
        }  # fmt: skip
        text = jwt.encode(claims, self._secret(), OURS, {"typ": OUR_TYPE})
        owner = replace(principal, permissions=given)
        return text, Token(owner, self._settings.issuer, token_id, begin, begin + int(lifetime))

    def verify(self, text: str) -> Token:
        """What a token says, if all of it holds. Raises Unauthenticated, always in the same words, or Unavailable."""
        try:
            parsed = _parse(text)
            issuer = parsed.claims.get("iss")
            outside = self._outside.get(issuer) if isinstance(issuer, str) else None
            token = self._verify_ours(text, parsed) if outside is None else _verify(text, parsed, outside)
            if self._keys.is_token_revoked(token.issuer, token.id):
                raise _Refused("it is revoked")
        except (_Refused, jwt.PyJWTError) as error:
            raise Unauthenticated(
                "the token is not valid; `POST /auth/token` makes one", code="invalid_token"
            ) from error
        return token

    def revoke(self, token: Token) -> None:
        self._keys.revoke_token(token.issuer, token.id, token.expires_at + LEEWAY_SECONDS)

    def revoke_by_id(self, token_id: str) -> None:
        """A token of whichever issuer, for as long as any may live."""
        lifetimes = [self._settings.token_seconds, *(each.settings.lifetime_seconds for each in self._outside.values())]
        self._keys.revoke_token("", token_id, self._now() + max(lifetimes) + 2 * LEEWAY_SECONDS)

    def refresh_keys(self) -> dict[str, list[str] | None]:
        """Read the keys of every outside issuer now: the `kid` of each, None where they did not come."""
        found: dict[str, list[str] | None] = {}
        for issuer, outside in self._outside.items():
            known = outside.key_set.keys() if outside.key_set.refresh() else None
            found[issuer] = None if known is None else sorted(kid or "" for kid in known)
        return found

    def _verify_ours(self, text: str, parsed: _Parsed) -> Token:
        if parsed.header.get("typ") != OUR_TYPE or "kid" in parsed.header:
            raise _Refused("its header is none of ours")
        settings = self._settings
        claims = _decode(
            text, parsed, self._secret(), [OURS], settings.issuer, settings.audience, settings.token_seconds
        )
        credential = claims.get("key")
        owner = self._keys.standing(credential) if isinstance(credential, str) else None
        if owner is None:
            raise _Refused("the key that it was made of lives no more")
        if (claims.get("tenant"), claims["sub"]) != (owner.tenant, owner.subject):
            raise _Refused("it is of another tenant or subject than its key")
        permissions = _permissions_of(claims) & owner.permissions
        return Token(
            replace(owner, permissions=permissions), settings.issuer, claims["jti"], claims["iat"], claims["exp"]
        )


def _verify(text: str, parsed: _Parsed, outside: _Outside) -> Token:
    """A token of an outside issuer. Its `credential` is the subject, so that a limit holds for all that it shows."""
    settings = outside.settings
    typ = parsed.header.get("typ")
    if (typ.lower() if isinstance(typ, str) else typ) not in TYPES:
        raise _Refused("its header names another type")
    kid = parsed.header.get("kid")
    keys = outside.key_set.keys()
    key = keys.get(kid) if kid is None or isinstance(kid, str) else None
    if key is None:
        outside.key_set.missed()
        raise _Refused("no key has its kid")
    if parsed.header.get("alg") != key.algorithm_name:
        raise _Refused("its key signs with another algorithm")
    claims = _decode(
        text, parsed, key, list(settings.algorithms), settings.issuer, settings.audience, settings.lifetime_seconds
    )
    for name in ("typ", "use", "token_use"):
        if name in claims and str(claims[name]).lower() not in USES:
            raise _Refused("it is no access token")
    if "cnf" in claims:
        raise _Refused("it is bound to a key whose possession nobody proves here")
    if claims.get("tenant") not in settings.tenants:
        raise _Refused("its issuer does not speak for its tenant")
    permissions = _permissions_of(claims) & frozenset(settings.permissions)
    principal = Principal(claims["tenant"], claims["sub"], permissions, f"{settings.issuer}#{claims['sub']}")
    return Token(principal, settings.issuer, claims["jti"], claims["iat"], claims["exp"])


def _decode(
    text: str, parsed: _Parsed, key: bytes | jwt.PyJWK, algorithms: list[str], issuer: str, audience: str,
    most_seconds: float,
) -> Mapping[str, Any]:  # fmt: skip
    """The claims, once signature, issuer, audience and times hold."""
    _check_types(parsed.claims)
    claims: dict[str, Any] = jwt.decode(
        text, key, algorithms, {"require": REQUIRED, "strict_aud": True, "enforce_minimum_key_length": True},
        audience=audience, issuer=issuer, leeway=LEEWAY_SECONDS,
    )  # fmt: skip
    if claims["exp"] - claims["iat"] > most_seconds or claims["exp"] <= claims["iat"]:
        raise _Refused("it lives for too long")
    return claims


def _check_types(claims: Mapping[str, Any]) -> None:
    for name in ("exp", "iat", "nbf"):
        value = claims.get(name, 0 if name == "nbf" else None)
        if type(value) is not int or not 0 <= value < MOST_TIME:
            raise _Refused(f"its {name} is missing, or no time")
    for name in ("iss", "aud", "sub", "jti"):
        value = claims.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= 2 * MOST_NAME or not value.isprintable():
            raise _Refused(f"its {name} is missing, or no name")
    if max(len(claims["sub"]), len(claims["jti"])) > MOST_NAME:
        raise _Refused("its sub or jti is too long")


def _permissions_of(claims: Mapping[str, Any]) -> frozenset[str]:
    """`permissions` as a list, or `scope` as a text with spaces (RFC 8693, 4.2)."""
    found = claims.get("permissions", claims.get("scope", []))
    listed = found.split(" ") if isinstance(found, str) and "permissions" not in claims else found
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise _Refused("its permissions are no list of names")
    return frozenset(listed)


def _parse(text: str) -> _Parsed:
    """Raises _Refused for all that two readers could read differently."""
    if len(text) > MOST_CHARACTERS:
        raise _Refused(f"it has more than {MOST_CHARACTERS} characters")
    found = FORM.fullmatch(text)
    if found is None:
        raise _Refused("it has not the form of a token")
    header, claims = _object(_bytes(found[1])), _object(_bytes(found[2]))
    _bytes(found[3])
    if not HEADER.issuperset(header):
        raise _Refused("its header says what means nothing here")
    return _Parsed(header, claims)


def _bytes(part: str) -> bytes:
    """Of base64url as only one text stands for them."""
    try:
        decoded = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error:
        raise _Refused("a part of it is no base64url") from None
    if base64.urlsafe_b64encode(decoded).rstrip(b"=").decode() != part:
        raise _Refused("a part of it is encoded in another way than the usual")
    return decoded


def _object(content: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _Refused("a part of it is no JSON that means one thing") from None
    if not isinstance(value, dict):
        raise _Refused("a part of it is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is there twice")
    return made


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")
