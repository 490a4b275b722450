"""Who comes in and who does not: rows J1 to J13, the keys of section 6, and API2 of `notes/security.md`.

The keys themselves are tested further in `test_access.py`. Every bad credential goes through the whole of the layers
around the routes, for a path of OpenAI's and for one of ours, and must come back as 401 with its code and nothing more.
"""

import base64
import hashlib
import hmac
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from pydantic import SecretStr, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from cluster import bootstrap
from deployments import cli, gateway, middleware, running
from deployments.client import Client
from nexus.access import CACHE_SECONDS, PERMISSIONS, KeyRing
from nexus.audit import Chain, Recorder
from nexus.config import Access, Config, Issuer
from nexus.errors import ConfigError, InvalidRequest, RateLimited, Unauthenticated, Unavailable, UpstreamInvalid
from nexus.key_sets import KEPT_SECONDS, FileKeys, UrlKeys, parse_key_set
from nexus.signing import FILE, SecretFile
from nexus.tokens import LEEWAY_SECONDS, MOST_CHARACTERS, Token, Tokens
from nexus.types import Principal
from nexus.verifier import Verifier, credential_in
from tests.conftest import Door
from tests.test_architecture import ROOT

OUTSIDE, THEIR_AUDIENCE = "https://issuer.example", "nexus-api"
LATE = int(LEEWAY_SECONDS) + 1
FAILURES = 5

Claims = Mapping[str, Any]


# ── forging ─────────────────────────────────────────────────────────────────────────────────────


def encode(part: bytes | Mapping[str, Any]) -> str:
    content = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def hs256(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda text: hmac.new(secret, text, hashlib.sha256).digest()


def rs256(text: bytes) -> bytes:
    """What the outside issuer's key r1 signs."""
    return rsa_key().sign(text, padding.PKCS1v15(), hashes.SHA256())


def assemble(
    header: bytes | Mapping[str, Any], claims: bytes | Claims, sign: Callable[[bytes], bytes] = lambda _: b""
) -> str:
    """A token of whatever is given: no library would write most of these."""
    body = f"{encode(header)}.{encode(claims)}"
    return f"{body}.{encode(sign(body.encode()))}"


@cache
def rsa_key(bits: int = 2048, number: int = 0) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def edward_key() -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


def public_jwk(key: Any, kid: str, alg: str) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name(alg)
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "alg": alg, "use": "sig"}  # type: ignore[attr-defined]


def their_set() -> dict[str, Any]:
    return {"keys": [public_jwk(rsa_key(), "r1", "RS256"), public_jwk(edward_key(), "e1", "EdDSA")]}


@dataclass
class Clock:
    """Monotonic seconds that pass when told to."""

    seconds: float = 1000.0

    def __call__(self) -> float:
        return self.seconds


async def show_principal(scope: Scope, receive: Receive, send: Send) -> None:
    principal = Request(scope).state.principal
    shown = {"tenant": principal.tenant, "subject": principal.subject, "credential": principal.credential}
    await JSONResponse({**shown, "permissions": sorted(principal.permissions)})(scope, receive, send)


@dataclass
class Realm:
    """An installation's credentials, one outside issuer, and the layers before a route that tells who came."""

    home: Path
    keys: KeyRing
    tokens: Tokens
    verifier: Verifier
    client: TestClient
    jwks: Path
    clock: Clock
    key: str
    principal: Principal = field(init=False)

    def __post_init__(self) -> None:
        self.principal = self.keys.verify(self.key)

    @property
    def secret(self) -> bytes:
        return (self.home / FILE).read_bytes().strip()

    def our_claims(self, **changed: Any) -> dict[str, Any]:
        now = int(time.time())
        claims = {
            "iss": "nexus", "aud": "nexus/dev", "sub": "ci", "jti": "j-1", "iat": now, "nbf": now, "exp": now + 600,
            "tenant": "acme", "permissions": ["documents:read"], "key": self.principal.credential,
        } | changed  # fmt: skip
        return {name: value for name, value in claims.items() if value is not ...}

    def ours(self, header: Mapping[str, Any] | None = None, raw: bytes | None = None, **changed: Any) -> str:
        """As Nexus makes them, signed with its secret, but for what is changed; `...` leaves a claim out."""
        shown = {"alg": "HS256", "typ": "at+jwt"} | dict(header or {})
        whole = {name: value for name, value in shown.items() if value is not ...}
        return assemble(whole, raw if raw is not None else self.our_claims(**changed), hs256(self.secret))

    def their_claims(self, **changed: Any) -> dict[str, Any]:
        claims = {"iss": OUTSIDE, "aud": THEIR_AUDIENCE, "sub": "auth0|7", "key": ...} | changed
        return self.our_claims(**claims)

    def theirs(
        self, header: Mapping[str, Any] | None = None, key: Any = None, alg: str = "RS256", **changed: Any
    ) -> str:
        """As the outside issuer makes them."""
        return jwt.encode(
            self.their_claims(**changed), key or rsa_key(), alg, {"kid": "r1", "typ": "JWT"} | dict(header or {})
        )

    def ask(self, credential: str | bytes, path: str = "/rag/documents") -> Any:
        content = credential if isinstance(credential, bytes) else credential.encode()
        return self.client.get(path, headers={"authorization": b"Bearer " + content})


def outside(jwks: Path, **changed: Any) -> Issuer:
    settings = {
        "issuer": OUTSIDE, "audience": THEIR_AUDIENCE, "tenants": ("acme", "beta"), "jwks_file": jwks,
        "algorithms": ("RS256", "PS256", "EdDSA"),
    }  # fmt: skip
    return Issuer(**{**settings, **changed})


@pytest.fixture
def realm(tmp_path: Path) -> Iterator[Realm]:
    with open_realm(tmp_path, FAILURES) as opened:
        yield opened


@pytest.fixture(scope="module")
def patient_realm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    """One for all that are only refused: it counts no failures."""
    with open_realm(tmp_path_factory.mktemp("home"), 10**9) as opened:
        yield opened


@contextmanager
def open_realm(home: Path, failures: int) -> Iterator[Realm]:
    jwks = home / "jwks.json"
    jwks.write_text(json.dumps(their_set()))
    clock = Clock()
    keys = KeyRing(home, elapsed=clock)
    settings = Access(issuers=(outside(jwks),))
    tokens = Tokens(keys, home, settings)
    verifier = Verifier(keys, tokens, failures, clock)
    recorder = Recorder(Chain(home))
    config = Config(home=home, http={"allowed_hosts": ["testserver"]})
    wrapped = middleware.wrap(show_principal, verifier, recorder, config, clock, True)
    client = TestClient(wrapped, raise_server_exceptions=False)
    text, _ = keys.create("ci", "acme", frozenset({"documents:read", "infer"}))
    yield Realm(home, keys, tokens, verifier, client, jwks, clock, text)
    recorder.close()
    keys.close()


def check_refused(realm: Realm, token: str | bytes, code: str = "invalid_token") -> None:
    """401 in both shapes, with nothing of the token in it, and the right words for a program."""
    text = token.decode("latin-1") if isinstance(token, bytes) else token
    for path in ("/rag/documents", "/v1/models"):
        answer = realm.ask(token, path)
        assert answer.status_code == 401, answer.text
        assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
        assert answer.headers["cache-control"] == "no-store" and answer.headers["x-request-id"]
        error = answer.json()["error"] if path.startswith("/v1/") else answer.json()
        assert error["code"] == code
        if path.startswith("/v1/"):
            assert set(error) == {"message", "type", "param", "code"} and error["type"] == "authentication_error"
        assert not text[:60] or len(text) < 4 or text[:60] not in answer.text


def test_what_is_forged_below_would_come_in_if_nothing_were_wrong_with_it(realm: Realm) -> None:
    """Else the cases below would be refused for a fault of the forger's."""
    for token, subject in (
        (realm.ours(), "ci"), (realm.theirs(), "auth0|7"),
        (realm.theirs({"kid": "e1"}, edward_key(), "EdDSA"), "auth0|7"),
        (realm.theirs({"typ": "at+jwt"}, scope="openid documents:read", permissions=...), "auth0|7"),
    ):  # fmt: skip
        for path in ("/rag/documents", "/v1/models"):
            answer = realm.ask(token, path)
            assert answer.status_code == 200, answer.text
            assert answer.json()["subject"] == subject and answer.json()["permissions"] == ["documents:read"]


# ── J1 to J9, J12, J13: one bad token each ──────────────────────────────────────────────────────


def their_public(form: str) -> bytes:
    public = rsa_key().public_key()
    wholes = {
        "PEM": (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        "PKCS1": (serialization.Encoding.PEM, serialization.PublicFormat.PKCS1),
        "DER": (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
    }
    if form in wholes:
        return public.public_bytes(*wholes[form])
    return json.dumps(their_set() if form == "JWKS" else their_set()["keys"][0]).encode()


Forgery = Callable[[Realm], str | bytes]


def confused(form: str, ours: bool) -> Forgery:
    def forge(realm: Realm) -> str:
        header = {"alg": "HS256", "typ": "at+jwt"} | ({} if ours else {"kid": "r1"})
        return assemble(header, realm.our_claims() if ours else realm.their_claims(), hs256(their_public(form)))

    return forge


def none(alg: Any, signed: bool, outside: bool) -> Forgery:
    def forge(realm: Realm) -> str:
        header = {"typ": "at+jwt"} | ({} if alg is ... else {"alg": alg}) | ({"kid": "r1"} if outside else {})
        claims = realm.their_claims() if outside else realm.our_claims()
        return assemble(header, claims, hs256(realm.secret) if signed else lambda _: b"")

    return forge


def with_header(**header: Any) -> Forgery:
    return lambda realm: realm.ours(header)


def with_claims(**claims: Any) -> Forgery:
    return lambda realm: realm.ours(**claims)


def of_theirs(header: Mapping[str, Any] | None = None, **claims: Any) -> Forgery:
    return lambda realm: realm.theirs(header, **claims)


def raw_claim(name: str, text: str) -> Forgery:
    """A claim as this text, which `json.dumps` would not write."""

    def forge(realm: Realm) -> str:
        whole = json.dumps(realm.our_claims(**{name: ...}))
        return realm.ours(raw=f'{whole[:-1]}, "{name}": {text}}}'.encode())

    return forge


def in_time(name: str, seconds: float) -> Forgery:
    return lambda realm: realm.ours(**{name: int(time.time() + seconds)})


def lifetime(seconds: int, theirs: bool = False) -> Forgery:
    def forge(realm: Realm) -> str:
        end = int(time.time()) + seconds
        return realm.theirs(exp=end) if theirs else realm.ours(exp=end)

    return forge


def changed(change: Callable[[str], str | bytes]) -> Forgery:
    return lambda realm: change(realm.ours())


def parts(change: Callable[[list[str]], list[str]]) -> Forgery:
    return lambda realm: ".".join(change(realm.ours().split(".")))


def next_letter(part: str) -> str:
    """The same bytes, for a decoder that does not look at the last bits: another last letter."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = part[:-1] + letters[letters.index(part[-1]) + 1]
    pad = "=" * (-len(part) % 4)
    assert base64.urlsafe_b64decode(other + pad) == base64.urlsafe_b64decode(part + pad)
    return other


def re_encoded(place: int) -> Forgery:
    """Header, payload or signature in another text for the same bytes; a signature over that text where it is asked."""

    def forge(realm: Realm) -> str:
        secret = realm.secret
        for filling in ("", "x", "xx"):  # until the part has bits to spare
            header = encode({"alg": "HS256", "typ": "at+jwt"} | ({} if place else {"x5t": filling}))
            claims = encode(realm.our_claims(filling=filling))
            made = [header, claims]
            if place < 2 and len(made[place]) % 4:
                made[place] = next_letter(made[place])
            elif place < 2:
                continue
            signature = encode(hs256(secret)(".".join(made).encode()))
            return ".".join([*made, next_letter(signature) if place == 2 else signature])
        raise AssertionError

    return forge


def their_own_key(**header: Any) -> Forgery:
    """Signed with a stranger's key, which the header brings along."""
    return lambda realm: realm.theirs({"jwk": public_jwk(rsa_key(2048, 1), "r1", "RS256"), **header}, rsa_key(2048, 1))


def nested(realm: Realm) -> str:
    return realm.ours({"cty": "JWT"}, raw=realm.ours().encode())


def another_home(realm: Realm) -> str:
    """Made by another installation for a key of the same name."""
    home = realm.home / "other"
    home.mkdir()
    with closing(KeyRing(home)) as keys:
        text, _ = keys.create("ci", "acme")
        return Tokens(keys, home, Access()).issue(keys.verify(text))[0]


BAD: dict[str, Forgery] = {
    **{
        f"J1-alg-{alg}-{'signed' if signed else 'empty'}-{'theirs' if out else 'ours'}": none(alg, signed, out)
        for alg in ("none", "None", "nOnE", "NONE", "", ..., None, ["HS256"], 256)
        for signed in (False, True)
        for out in (False, True)
    },
    "J1-HS256-without-a-signature": lambda realm: assemble({"alg": "HS256", "typ": "at+jwt"}, realm.our_claims()),
    "J1-RS256-without-a-signature": lambda realm: assemble({"alg": "RS256", "kid": "r1"}, realm.their_claims()),
    **{
        f"J2-{form}-as-the-secret-{'ours' if ours else 'theirs'}": confused(form, ours)
        for form in ("PEM", "PKCS1", "DER", "JWK", "JWKS")
        for ours in (False, True)
    },
    "J2-HS256-with-our-secret-for-their-token": lambda realm: assemble(
        {"alg": "HS256", "kid": "r1"}, realm.their_claims(), hs256(realm.secret)
    ),
    "J2-their-key-for-our-token": lambda realm: jwt.encode(realm.our_claims(), rsa_key(), "RS256", {"typ": "at+jwt"}),
    "J3-PS256-of-a-key-for-RS256": lambda realm: realm.theirs(alg="PS256"),
    "J3-RS512-of-a-key-for-RS256": lambda realm: realm.theirs(alg="RS512"),
    "J3-EdDSA-under-an-RSA-kid": lambda realm: realm.theirs(key=edward_key(), alg="EdDSA"),
    "J3-HS512-with-our-secret": lambda realm: jwt.encode(realm.our_claims(), realm.secret, "HS512", {"typ": "at+jwt"}),
    "J3-HS384-with-our-secret": lambda realm: jwt.encode(realm.our_claims(), realm.secret, "HS384", {"typ": "at+jwt"}),
    "J4-crit-b64": with_header(crit=["b64"], b64=True),
    "J4-crit-unknown": with_header(crit=["x"], x=1),
    "J4-crit-empty": with_header(crit=[]),
    "J4-b64-alone": with_header(b64=False),
    "J4-zip": with_header(zip="DEF"),
    **{
        f"J5-kid-{name}-{'theirs' if out else 'ours'}": of_theirs({"kid": kid}) if out else with_header(kid=kid)
        for name, kid in {
            "path": "../../dev/null", "SQL": "r1' UNION SELECT 'x", "URL": "https://evil.example/k", "long": "k" * 4000,
            "unknown": "r2", "case": "R1", "empty": "", "blank": "r1 ", "NUL": "r1\0",
        }.items()
        for out in (False, True)
    },
    **{
        f"J5-kid-{name}": lambda realm, header=header: assemble({"alg": "RS256", **header}, realm.their_claims(), rs256)
        for name, header in {
            "number": {"kid": 1}, "list": {"kid": ["r1"]}, "null": {"kid": None}, "missing": {},
        }.items()
    },
    "J5-kid-megabyte": lambda realm: realm.ours({"kid": "k" * 2**20}),
    "J5-empty-secret-of-dev-null": lambda realm: assemble(
        {"alg": "HS256", "typ": "at+jwt", "kid": "/dev/null"}, realm.our_claims(), hs256(b"")
    ),
    "J5-embedded-jwk": their_own_key(),
    "J5-jku": their_own_key(jku="https://evil.example/jwks.json", jwk=None),
    "J5-x5u": with_header(x5u="https://evil.example/cert.pem"),
    "J5-x5c": with_header(x5c=["MIIB"]),
    "J6-exp-missing": with_claims(exp=...),
    "J6-exp-past": lambda realm: realm.ours(exp=int(time.time()) - LATE, iat=int(time.time()) - 600, nbf=...),
    "J6-exp-string": raw_claim("exp", f'"{2**31}"'),
    "J6-exp-NaN": raw_claim("exp", "NaN"),
    "J6-exp-Infinity": raw_claim("exp", "Infinity"),
    "J6-exp-1e308": raw_claim("exp", "1e308"),
    "J6-exp-true": raw_claim("exp", "true"),
    "J6-exp-null": raw_claim("exp", "null"),
    "J6-exp-negative": with_claims(exp=-1),
    "J6-exp-of-5000-digits": raw_claim("exp", "9" * 5000),
    "J6-exp-list": with_claims(exp=[2**31]),
    **{f"J6-{name}-missing": with_claims(**{name: ...}) for name in ("iat", "iss", "aud", "sub", "jti", "key")},
    **{f"J6-{name}-missing-of-theirs": of_theirs(**{name: ...}) for name in ("iat", "iss", "aud", "sub", "jti")},
    **{f"J6-{name}-number": with_claims(**{name: 7}) for name in ("iss", "aud", "sub", "jti", "key", "tenant")},
    "J6-sub-empty": of_theirs(sub=""),
    "J6-sub-too-long": of_theirs(sub="s" * 300),
    "J6-sub-with-a-line-break": of_theirs(sub="a\nb"),
    "J6-jti-too-long": of_theirs(jti="s" * 300),
    "J6-permissions-a-text": with_claims(permissions="admin"),
    "J6-permissions-of-numbers": with_claims(permissions=[1]),
    "J7-nbf-in-the-future": in_time("nbf", LATE + 5),
    "J7-nbf-a-text": with_claims(nbf="0"),
    "J7-nbf-true": with_claims(nbf=True),
    "J7-iat-in-the-future": in_time("iat", LATE + 5),
    "J7-lives-too-long": lifetime(3601),
    "J7-lives-for-years": lifetime(10 * 365 * 86_400),
    "J7-theirs-lives-too-long": lifetime(3601, theirs=True),
    "J7-ends-before-it-begins": lambda realm: realm.ours(iat=int(time.time()) + 5, exp=int(time.time()) + 5, nbf=...),
    **{
        f"J8-aud-{name}": with_claims(aud=aud)
        for name, aud in {
            "wrong": "other", "list-with-another": ["nexus/dev", "other"], "list-of-ours": ["nexus/dev"],
            "prefix": "nexus/dev2", "shorter": "nexus", "case": "NEXUS/DEV", "empty": "",
            "of-an-environment": "nexus/live",
        }.items()
    },
    "J8-theirs-aud-list-with-another": of_theirs(aud=[THEIR_AUDIENCE, "other"]),
    "J8-theirs-with-our-aud": of_theirs(aud="nexus/dev"),
    **{
        f"J8-iss-{name}": of_theirs(iss=iss)
        for name, iss in {
            "longer": f"{OUTSIDE}.evil", "with-a-slash": f"{OUTSIDE}/", "case": OUTSIDE.upper(), "empty": "",
            "list": [OUTSIDE], "ours": "nexus", "user-info": f"{OUTSIDE}@evil.example",
        }.items()
        if not isinstance(iss, list)
    },
    "J8-iss-list": lambda realm: assemble(
        {"alg": "RS256", "kid": "r1"}, realm.their_claims(iss=[OUTSIDE]), rs256
    ),
    "J9-typ-missing": with_header(typ=...),
    "J9-typ-JWT": with_header(typ="JWT"),
    "J9-typ-refresh": with_header(typ="rt+jwt"),
    "J9-theirs-typ-refresh": of_theirs({"typ": "rt+jwt"}),
    "J9-theirs-typ-a-logout-token": of_theirs({"typ": "logout+jwt"}),
    "J9-theirs-claim-typ-Refresh": of_theirs(typ="Refresh"),
    "J9-theirs-claim-typ-ID": of_theirs(typ="ID"),
    "J9-theirs-claim-use-refresh": of_theirs(use="refresh"),
    "J9-theirs-claim-token_use-id": of_theirs(token_use="id"),
    "J9-theirs-bound-to-a-key": of_theirs(cnf={"jkt": "x"}),
    "J9-another-tenant": with_claims(tenant="beta"),
    "J9-tenant-missing": with_claims(tenant=...),
    "J9-another-subject": with_claims(sub="admin"),
    "J9-theirs-another-tenant": of_theirs(tenant="default"),
    "J9-theirs-tenant-missing": of_theirs(tenant=...),
    "J9-theirs-tenant-list": of_theirs(tenant=["acme"]),
    "J9-another-installation": another_home,
    "J12-claim-twice": raw_claim("sub", '"ci", "sub": "ci"'),
    "J12-permissions-twice": raw_claim("permissions", '[], "permissions": ["admin"]'),
    "J12-header-twice": lambda realm: assemble(
        b'{"alg":"HS256","typ":"at+jwt","alg":"HS256"}', realm.our_claims(), hs256(realm.secret)
    ),
    "J12-not-UTF-8": lambda realm: realm.ours(raw=json.dumps(realm.our_claims()).encode().replace(b"ci", b"\xff\xfe")),
    "J12-UTF-16": lambda realm: realm.ours(raw=json.dumps(realm.our_claims()).encode("utf-16")),
    "J12-byte-order-mark": lambda realm: realm.ours(raw=json.dumps(realm.our_claims()).encode("utf-8-sig")),
    "J12-lone-surrogate": of_theirs(sub="a\ud800"),
    "J12-four-parts": changed(lambda token: f"{token}.{token.split('.')[0]}"),
    "J12-five-parts": parts(lambda p: [*p, p[0], p[1]]),
    "J12-two-parts": parts(lambda p: p[:2]),
    "J12-empty-parts": changed(lambda token: ".."),
    "J12-no-header": parts(lambda p: ["", *p[1:]]),
    "J12-no-claims": parts(lambda p: [p[0], "", p[2]]),
    "J12-100-KB": lambda realm: realm.ours(filling="x" * 100_000),
    "J12-one-over-the-budget": lambda realm: realm.ours(
        filling="x" * ((MOST_CHARACTERS - len(realm.ours(filling=""))) * 3 // 4 + 3)
    ),
    "J12-nested": nested,
    "J12-claims-a-list": lambda realm: realm.ours(raw=b'["a"]'),
    "J12-claims-a-text": lambda realm: realm.ours(raw=b'"a"'),
    "J12-claims-empty": lambda realm: realm.ours(raw=b"{}"),
    "J12-header-a-list": lambda realm: assemble(b"[]", realm.our_claims(), hs256(realm.secret)),
    "J12-no-JSON": lambda realm: realm.ours(raw=b"{sub: 1}"),
    "J12-deep": lambda realm: realm.ours(raw=b"[" * 5000),
    "J12-deep-objects": raw_claim("deep", '{"a":' * 900 + "1" + "}" * 900 + "]"),
    "J12-blank-inside": parts(lambda p: [p[0], " " + p[1], p[2]]),
    "J12-tab-inside": parts(lambda p: [p[0], p[1] + "\t", p[2]]),
    "J12-letters-of-elsewhere": changed(lambda token: token.encode() + "é".encode("latin-1")),
    "J12-plus-and-slash": parts(lambda p: [p[0], p[1] + "+/", p[2]]),
    "J12-a-quote-around": changed(lambda token: f'"{token}"'),
    "J12-two-tokens": changed(lambda token: f"{token} {token}"),
    "J12-signature-cut": changed(lambda token: token[:-2]),
    "J12-signature-longer": changed(lambda token: token + "AAAA"),
    "J13-padded-header": parts(lambda p: [p[0] + "=", *p[1:]]),
    "J13-padded-claims": parts(lambda p: [p[0], p[1] + "==", p[2]]),
    "J13-padded-signature": parts(lambda p: [*p[:2], p[2] + "="]),
    "J13-another-last-letter-of-the-header": re_encoded(0),
    "J13-another-last-letter-of-the-claims": re_encoded(1),
    "J13-another-last-letter-of-the-signature": re_encoded(2),
    "J13-claims-changed": parts(lambda p: [p[0], encode(b'{"sub":"admin"}'), p[2]]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=str)
def test_a_bad_token_is_refused(patient_realm: Realm, name: str) -> None:
    check_refused(patient_realm, BAD[name](patient_realm))


def test_J6_J7_clocks_may_differ_a_little_and_no_more(realm: Realm) -> None:
    now, little = int(time.time()), int(LEEWAY_SECONDS) - 3
    assert LEEWAY_SECONDS <= 30
    assert realm.ask(realm.ours(exp=now - little, iat=now - 600, nbf=now - 600)).status_code == 200
    assert realm.ask(realm.ours(iat=now + little, nbf=now + little)).status_code == 200


def test_J9_a_token_of_another_environment_with_the_same_secret_is_refused(realm: Realm) -> None:
    shared = SecretStr("q7Hd02kfPw9xZt4Lm8Rv1Ny6Bc3Js5Ga")
    live = Tokens(realm.keys, realm.home, Access(mode="production", token_secret=shared))
    here = Tokens(realm.keys, realm.home, Access(token_secret=shared))
    text, _ = live.issue(realm.principal)
    assert live.verify(text).principal.subject == "ci"
    with pytest.raises(Unauthenticated, match="token"):
        here.verify(text)


def test_a_token_gives_no_more_than_its_key_or_its_issuer_may(realm: Realm) -> None:
    wanted = ["admin", "documents:read", "documents:write", "fly"]
    assert realm.ask(realm.ours(permissions=wanted)).json()["permissions"] == ["documents:read"]
    assert realm.ask(realm.theirs(permissions=wanted)).json()["permissions"] == ["documents:read", "documents:write"]
    assert realm.ask(realm.theirs(permissions=...)).json()["permissions"] == []


def test_a_limit_holds_for_all_tokens_of_a_key_and_of_a_subject_together(realm: Realm) -> None:
    text, key = realm.keys.create("busy", "acme", requests_per_minute=7, tokens_per_minute=900)
    for _ in range(2):
        token, _ = realm.tokens.issue(realm.keys.verify(text))
        principal = realm.tokens.verify(token).principal
        assert (principal.credential, principal.requests_per_minute, principal.tokens_per_minute) == (key.id, 7, 900)
    assert realm.tokens.verify(realm.theirs()).principal.credential == f"{OUTSIDE}#auth0|7"


def test_what_was_wrong_with_a_token_is_for_the_record_and_the_token_is_in_no_log(
    realm: Realm, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    noted: dict[str, Any] = {}

    async def auditing(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["request_id"] = "r"
        scope["state"]["audited"] = noted
        await middleware.Answering(middleware.Identity(show_principal, realm.verifier))(scope, receive, send)

    token = realm.ours(tenant="beta")
    answer = TestClient(auditing).get("/rag/documents", headers={"authorization": f"Bearer {token}"})
    assert answer.status_code == 401 and "tenant" not in answer.json()["detail"]
    told = "invalid_token: it is of another tenant or subject than its key"
    assert noted == {"action": "auth.failed", "reason": told}
    assert token not in caplog.text and realm.key not in caplog.text


# ── J10: the secret ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "secret",
    [
        "short", "x" * 31, "q7Hd02kfPw9xZt4Lm8Rv1Ny6Bc3Js5G", "secret" * 8, "changeme-changeme-changeme-changeme",
        "your-256-bit-secret-your-256-bit-secret", "a" * 64, "0" * 64, "abcabcabcabcabcabcabcabcabcabcabcabcabc1",
        "correct-horse-battery-staple-correct-horse", "01234567890123456789012345678901234567890123",
        "this-is-my-super-secret-jwt-signing-key-please-change", "Nexus-Production-Token-Secret-Key-Default-256",
        "passwordpasswordpasswordpassword1", "                                        ",
    ],
)  # fmt: skip
def test_J10_a_weak_secret_is_refused_at_start_up(secret: str) -> None:
    with pytest.raises(ValidationError, match=r"secret|bytes"):
        Access(token_secret=SecretStr(secret))


@pytest.mark.parametrize(
    "secret",
    [
        "q7Hd02kfPw9xZt4Lm8Rv1Ny6Bc3Js5Ga", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "h4pXzQ0bN2cT8vYk3mWs6dRf1gJ7lA9eUo5iKyBxVnM=",
    ],
)  # fmt: skip
def test_J10_a_random_secret_is_taken_and_never_shown(secret: str) -> None:
    settings = Access(token_secret=SecretStr(secret))
    assert secret not in repr(settings) and secret not in settings.model_dump_json()


def test_J10_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    made = SecretFile(tmp_path).read()
    assert len(made) >= 32 and SecretFile(tmp_path).read() == made
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [("q7Hd02kfPw9xZt4Lm8Rv1Ny6Bc3Js5Ga", 0o644, "chmod 600"), ("q7Hd02kf", 0o600, "32"), ("", 0o600, "32")],
    ids=["others-may-read-it", "too-short", "empty"],
)
def test_J10_a_secret_file_that_is_no_good_refuses_the_start(
    tmp_path: Path, content: str, mode: int, words: str
) -> None:
    (tmp_path / FILE).write_text(content)
    (tmp_path / FILE).chmod(mode)
    with pytest.raises(ConfigError, match=words) as caught:
        SecretFile(tmp_path)
    assert content == "" or content not in caught.value.message


def test_J10_a_secret_file_that_is_emptied_lets_nobody_in_and_makes_nothing(realm: Realm) -> None:
    """Else whoever signs with nothing would be let in."""
    (realm.home / FILE).write_text("\n")
    forged = assemble({"alg": "HS256", "typ": "at+jwt"}, realm.our_claims(), hs256(b""))
    assert realm.ask(forged).status_code == 503
    with pytest.raises(Unavailable, match="too short"):
        realm.tokens.issue(realm.principal)
    assert realm.ask(realm.key).status_code == 200


# ── J11: what ends before its time ──────────────────────────────────────────────────────────────


def test_J11_a_revoked_token_is_refused_at_once_and_no_other_is(realm: Realm) -> None:
    first, token = realm.tokens.issue(realm.principal)
    second, _ = realm.tokens.issue(realm.principal)
    assert realm.ask(first).status_code == 200
    realm.tokens.revoke(token)
    check_refused(realm, first)
    assert realm.ask(second).status_code == 200


def test_J11_a_token_revoked_elsewhere_is_refused_within_five_seconds(realm: Realm) -> None:
    text, token = realm.tokens.issue(realm.principal)
    assert realm.ask(text).status_code == 200
    with closing(KeyRing(realm.home)) as another_process:
        another_process.revoke_token(token.issuer, token.id, token.expires_at)
    realm.clock.seconds += 5
    assert CACHE_SECONDS <= 5
    check_refused(realm, text)


def test_J11_a_token_ends_with_its_key(realm: Realm) -> None:
    text, _ = realm.tokens.issue(realm.principal)
    assert realm.ask(text).status_code == 200
    realm.keys.revoke(realm.principal.credential)
    check_refused(realm, text)
    check_refused(realm, realm.key, "invalid_api_key")


def test_J11_a_token_of_a_key_revoked_elsewhere_is_refused_within_five_seconds(realm: Realm) -> None:
    text, _ = realm.tokens.issue(realm.principal)
    assert realm.ask(text).status_code == 200
    with closing(KeyRing(realm.home)) as another_process:
        another_process.revoke(realm.principal.credential)
    realm.clock.seconds += 5
    check_refused(realm, text)
    check_refused(realm, realm.key, "invalid_api_key")


def test_J11_a_token_does_not_outlive_its_key(tmp_path: Path) -> None:
    now = Clock(time.time())
    with closing(KeyRing(tmp_path, now=now)) as keys:
        tokens = Tokens(keys, tmp_path, Access())
        key, _ = keys.create("ci", lifetime_seconds=60)
        text, _ = tokens.issue(keys.verify(key))
        assert tokens.verify(text).principal.subject == "ci"
        now.seconds += 61
        with pytest.raises(Unauthenticated):
            tokens.verify(text)


def test_J11_another_secret_ends_all_tokens_at_once(realm: Realm) -> None:
    text, _ = realm.tokens.issue(realm.principal)
    assert realm.ask(text).status_code == 200
    (realm.home / FILE).unlink()
    SecretFile(realm.home)
    check_refused(realm, text)
    assert realm.ask(realm.tokens.issue(realm.principal)[0]).status_code == 200


def test_J11_a_rotated_key_of_an_issuer_ends_what_the_old_one_signed(realm: Realm) -> None:
    old = realm.theirs()
    assert realm.ask(old).status_code == 200
    fresh = rsa_key(2048, 2)
    realm.jwks.write_text(json.dumps({"keys": [public_jwk(fresh, "r2", "RS256")]}))
    check_refused(realm, old)
    assert realm.ask(realm.theirs({"kid": "r2"}, fresh)).status_code == 200


def test_J11_one_issuers_revocation_is_not_anothers_and_an_administrators_is_everybodys(realm: Realm) -> None:
    ours, theirs = realm.ours(jti="same"), realm.theirs(jti="same")
    realm.tokens.revoke(realm.tokens.verify(theirs))
    check_refused(realm, theirs)
    assert realm.ask(ours).status_code == 200
    realm.tokens.revoke_by_id("same")
    check_refused(realm, ours)


def test_J11_where_it_cannot_be_read_what_is_revoked_nobody_comes_in(realm: Realm) -> None:
    text, _ = realm.tokens.issue(realm.principal)
    realm.clock.seconds += 5
    with closing(sqlite3.connect(realm.home / "access.db")) as spoiler:
        spoiler.execute("DROP TABLE revoked_tokens")
        spoiler.execute("DROP TABLE keys")
    for credential in (text, realm.key):
        for path in ("/rag/documents", "/v1/models"):
            answer = realm.ask(credential, path)
            assert answer.status_code == 503 and "table" not in answer.text


def test_J11_revocations_are_forgotten_when_the_token_would_have_ended(tmp_path: Path) -> None:
    now = Clock(time.time())
    with closing(KeyRing(tmp_path, now=now)) as keys:
        keys.revoke_token("nexus", "first", now.seconds + 10)
        now.seconds += 60
        keys.revoke_token("nexus", "second", now.seconds + 10)
        assert [keys.is_token_revoked("nexus", each) for each in ("first", "second")] == [False, True]


@pytest.mark.parametrize("kind", ["one token", "any of its id"])
def test_J11_a_revocation_lasts_for_as_long_as_the_token_could_be_taken(tmp_path: Path, kind: str) -> None:
    """Those whose time is over are forgotten with each new one: not a moment too soon."""
    now = Clock(time.time())
    with closing(KeyRing(tmp_path, now=now)) as keys:
        jwks = tmp_path / "jwks.json"
        jwks.write_text(json.dumps(their_set()))
        tokens = Tokens(keys, tmp_path, Access(issuers=(outside(jwks, lifetime_seconds=86_400),)), now=now)
        begin = int(now.seconds)
        token = Token(Principal("acme", "x", frozenset()), OUTSIDE, "long", begin, begin + 86_400)
        if kind == "one token":
            tokens.revoke(token)
            tokens.revoke(replace(token, expires_at=begin + 1))  # shorter ones change nothing
        else:
            tokens.revoke_by_id("long")
        now.seconds = token.expires_at + LEEWAY_SECONDS - 1
        keys.revoke_token("nexus", "another", now.seconds)
        assert keys.is_token_revoked(OUTSIDE, "long")


# ── outside issuers' keys ───────────────────────────────────────────────────────────────────────


def with_key(**changed: Any) -> dict[str, Any]:
    return {"keys": [{**their_set()["keys"][0], **changed}]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b'{"keys": 1}', b'{"keys": [1]}', b'{"keys": [{}]}', b"\xff", b"[" * 100_000,
        json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "s"}]}).encode(),
        json.dumps({"keys": their_set()["keys"][:1] * 2}).encode(),
        json.dumps({"keys": [{"kty": "RSA", "kid": "x", "n": "!", "e": "AQAB"}]}).encode(),
        json.dumps({"keys": [json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa_key(2048, 3)))]}).encode(),
        json.dumps({"keys": [public_jwk(rsa_key(1024), "weak", "RS256")]}).encode(),
        json.dumps(with_key(alg="HS256")).encode(),
        json.dumps({"keys": [{"kty": "RSA"}] * 1000}).encode(),
    ],
    ids=[
        "empty", "list", "no-keys", "keys-a-number", "key-a-number", "key-empty", "not-UTF-8", "deep", "secret",
        "kid-twice", "broken", "private", "weak", "HS256-for-an-RSA-key", "thousand",
    ],
)  # fmt: skip
def test_J2_a_key_set_that_is_no_good_is_refused_whole(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UpstreamInvalid):
        parse_key_set(content, ("RS256", "EdDSA"))
    (tmp_path / "jwks.json").write_bytes(content)
    with pytest.raises(ConfigError):
        FileKeys(tmp_path / "jwks.json", ("RS256",))


def test_keys_to_encrypt_and_of_other_algorithms_are_left_out() -> None:
    assert not parse_key_set(json.dumps(with_key(use="enc")).encode(), ("RS256",))
    assert set(parse_key_set(json.dumps(their_set()).encode(), ("RS256",))) == {"r1"}


def test_a_key_file_that_goes_away_lets_nobody_in(realm: Realm) -> None:
    token = realm.theirs()
    assert realm.ask(token).status_code == 200
    realm.jwks.unlink()
    answer = realm.ask(token)
    assert answer.status_code == 503 and str(realm.jwks) not in answer.text
    assert realm.ask(realm.ours()).status_code == 200


@dataclass
class KeyServer:
    """A loopback double of an issuer's JWKS address. It says 304 to who names the ETag that it has."""

    url: str
    answer: dict[str, Any]
    heard: list[Mapping[str, str]] = field(default_factory=list)  # the headers of each request, in lower case

    @property
    def asked(self) -> int:
        return len(self.heard)

    def serve(self, *keys: Mapping[str, Any], **headers: str) -> None:
        self.answer = {"status": 200, "content": json.dumps({"keys": keys}).encode(), "headers": headers}


@pytest.fixture
def key_server() -> Iterator[KeyServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.heard.append({name.lower(): value for name, value in self.headers.items()})
            headers = served.answer.get("headers", {})
            is_known = "etag" in headers and headers["etag"] == served.heard[-1].get("if-none-match")
            self.send_response(304 if is_known else served.answer["status"])
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if is_known else served.answer["content"])

        def log_message(self, format: str, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        content = json.dumps(their_set()).encode()
        served = KeyServer(f"http://127.0.0.1:{server.server_port}/jwks", {"status": 200, "content": content})
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield served
        server.shutdown()
        thread.join()


def test_keys_of_a_url_are_never_fetched_by_a_request(realm: Realm, key_server: KeyServer) -> None:
    keys = UrlKeys(key_server.url, ("RS256",), 300)
    settings = outside(realm.jwks, jwks_file=None, jwks_url=key_server.url)
    tokens = Tokens(realm.keys, realm.home, Access(issuers=(settings,)), open_keys=lambda _: keys)
    with pytest.raises(Unavailable):
        tokens.verify(realm.theirs())
    assert key_server.asked == 0
    assert keys.refresh() and key_server.asked == 1
    assert tokens.verify(realm.theirs()).principal.tenant == "acme"
    with pytest.raises(Unauthenticated):
        tokens.verify(realm.theirs({"kid": "r9"}))
    assert keys._wanted.is_set() and key_server.asked == 1


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 500, "content": b""}, {"status": 200, "content": b"<html>"},
        {"status": 302, "content": b"", "headers": {"location": "/elsewhere"}},
        {"status": 200, "content": b'{"keys": [' + b" " * 300_000 + b"]}"},
        {"status": 200, "content": b'{"keys": [{"kty": "oct", "k": "AA"}]}'},
    ],
    ids=["fault", "HTML", "redirect", "huge", "secret"],
)  # fmt: skip
def test_keys_stay_for_a_while_when_their_url_answers_nonsense(key_server: KeyServer, answer: dict[str, Any]) -> None:
    clock = Clock()
    keys = UrlKeys(key_server.url, ("RS256",), 300, clock)
    assert keys.refresh() and set(keys.keys()) == {"r1"}
    key_server.answer = answer
    assert not keys.refresh() and key_server.asked == 2
    assert set(keys.keys()) == {"r1"}
    clock.seconds += KEPT_SECONDS + 1
    with pytest.raises(Unavailable):
        keys.keys()


def test_J11_a_key_that_an_issuer_takes_out_ends_as_soon_as_its_set_is_read_again(
    realm: Realm, key_server: KeyServer
) -> None:
    keys = UrlKeys(key_server.url, ("RS256",), 60)
    settings = outside(realm.jwks, jwks_file=None, jwks_url=key_server.url)
    assert 5 <= settings.refresh_seconds <= 60
    tokens = Tokens(realm.keys, realm.home, Access(issuers=(settings,)), open_keys=lambda _: keys)
    assert tokens.refresh_keys() == {OUTSIDE: ["r1"]}
    old, fresh = realm.theirs(), rsa_key(2048, 2)
    key_server.serve(public_jwk(fresh, "r2", "RS256"))
    assert tokens.verify(old).principal.tenant == "acme"
    assert tokens.refresh_keys() == {OUTSIDE: ["r2"]}
    with pytest.raises(Unauthenticated):
        tokens.verify(old)
    assert tokens.verify(realm.theirs({"kid": "r2"}, fresh)).principal.tenant == "acme"
    key_server.answer = {"status": 500, "content": b""}
    assert tokens.refresh_keys() == {OUTSIDE: None}
    assert tokens.verify(realm.theirs({"kid": "r2"}, fresh)).principal.tenant == "acme"


def test_J11_keys_in_a_file_are_read_anew_and_named_too(realm: Realm) -> None:
    assert realm.tokens.refresh_keys() == {OUTSIDE: ["e1", "r1"]}
    realm.jwks.unlink()
    assert realm.tokens.refresh_keys() == {OUTSIDE: None}


def test_what_did_not_change_is_not_sent_again_and_is_as_fresh_as_new(key_server: KeyServer) -> None:
    clock = Clock()
    keys = UrlKeys(key_server.url, ("RS256", "EdDSA"), 60, clock)
    first, second = their_set()["keys"]
    key_server.serve(first, etag='"1"')
    assert keys.refresh() and "if-none-match" not in key_server.heard[0]
    clock.seconds += KEPT_SECONDS
    assert keys.refresh() and key_server.heard[1]["if-none-match"] == '"1"'
    clock.seconds += KEPT_SECONDS
    assert set(keys.keys()) == {"r1"}
    key_server.serve(second, etag='"2"')
    assert keys.refresh() and set(keys.keys()) == {"e1"}
    assert {one["cache-control"] for one in key_server.heard} == {"no-cache"}, "no cache in between answers for it"


def test_a_set_that_is_no_good_is_not_taken_for_known(key_server: KeyServer) -> None:
    keys = UrlKeys(key_server.url, ("RS256",), 60)
    key_server.serve({"kty": "oct", "k": "AA"}, etag='"bad"')
    assert not keys.refresh() and not keys.refresh()
    assert "if-none-match" not in key_server.heard[1]
    key_server.answer = {"status": 304, "content": b""}
    assert not keys.refresh(), "nobody asked whether it changed"
    with pytest.raises(Unavailable):
        keys.keys()


# ── section 6 and API2: keys, guesses, and where a credential may stand ─────────────────────────


@pytest.mark.parametrize("path", ["/rag/documents", "/v1/models"])
def test_API2_without_a_credential_nothing_answers(realm: Realm, path: str) -> None:
    for headers in ({}, {"authorization": ""}, {"authorization": "Basic YTpi"}, {"authorization": "Bearer "}):
        assert realm.client.get(path, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "bad",
    ["garbage", "Bearer", "nx_", "nx_dev__", "null", "undefined", "{}", "é", "🔑", "0", "x" * 10_000, "a.b", "nx_live"],
)
def test_API2_garbage_is_refused(patient_realm: Realm, bad: str) -> None:
    assert patient_realm.ask(bad).status_code == 401
    assert patient_realm.client.get("/v1/models", headers={"x-api-key": bad.encode()}).status_code == 401


def test_API2_unknown_wrong_revoked_and_expired_keys_are_refused_in_the_same_words(realm: Realm) -> None:
    from nexus.access import _checksum

    revoked, key = realm.keys.create("gone")
    realm.keys.revoke(key.id)
    expired, _ = realm.keys.create("old", lifetime_seconds=-1)
    body = realm.key.rpartition("_")[0]
    wrong, unknown = f"{body[:-1]}{'a' if body[-1] != 'a' else 'b'}", body.replace(realm.principal.credential, "A" * 12)
    forged = [f"{each}_{_checksum(each)}" for each in (wrong, unknown)]
    told = set()
    for text in (*forged, revoked, expired, "garbage", realm.key[:-1]):
        answer = realm.ask(text).json()
        told.add((answer["detail"], answer["code"], answer["title"]))
    assert len(told) == 1


@pytest.mark.parametrize(
    "query",
    [
        "api_key={key}", "API-KEY={key}", "apikey={key}", "key={key}", "token={key}", "access_token={key}",
        "x-api-key={key}", "authorization=Bearer%20{key}", "q=1&access_token={key}", "anything={key}",
        "anything=prefix-{key}", "access_token=", "jwt=a.b.c", "bearer_token=x", "anything={jwt}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/rag/documents", "/v1/models"])
def test_API2_a_credential_in_the_url_is_refused_even_beside_a_right_one(
    patient_realm: Realm, query: str, path: str
) -> None:
    realm = patient_realm
    url = f"{path}?{query.format(key=realm.key, jwt=realm.ours())}"
    for headers in ({}, {"authorization": f"Bearer {realm.key}"}):
        answer = realm.client.get(url, headers=headers)
        assert answer.status_code == 401 and "credential_in_url" in answer.text
        assert realm.key not in answer.text


def test_other_queries_are_no_credentials() -> None:
    assert not credential_in(
        [("limit", "10"), ("after", "abc.def.ghi"), ("keep_seconds", "0"), ("verbose", ""), ("id", "x")]
    )


def test_API2_two_credentials_that_differ_are_refused(realm: Realm) -> None:
    other, _ = realm.keys.create("other")
    right = {"authorization": f"Bearer {realm.key}"}
    assert realm.client.get("/rag/x", headers={**right, "x-api-key": realm.key}).status_code == 200
    assert realm.client.get("/rag/x", headers={**right, "x-api-key": other}).status_code == 401
    assert realm.client.get("/rag/x", headers=[*right.items(), ("authorization", f"Bearer {other}")]).status_code == 401


def wrong_secret(key: str) -> str:
    """A key that is right in all but its secret."""
    from nexus.access import _checksum

    body = key.rpartition("_")[0]
    wrong = f"{body[:-1]}{'a' if body[-1] != 'a' else 'b'}"
    return f"{wrong}_{_checksum(wrong)}"


def test_API2_after_some_guesses_at_a_key_the_address_waits_and_nobody_else(realm: Realm) -> None:
    other, _ = realm.keys.create("other")
    guess = wrong_secret(realm.key)
    assert [realm.ask(guess).status_code for _ in range(FAILURES + 2)] == [401] * FAILURES + [429] * 2
    assert realm.ask(realm.key).status_code == 429, "else a right guess would show itself"
    assert int(realm.ask(guess).headers["retry-after"]) >= 1
    assert realm.ask(other).status_code == 200
    assert realm.verifier.verify(realm.key, "198.51.100.7").principal.subject == "ci"
    realm.clock.seconds += 61
    assert realm.ask(realm.key).status_code == 200


def test_API2_of_a_thousand_wrong_keys_most_meet_429_and_right_ones_still_come_in(realm: Realm) -> None:
    with closing(KeyRing(realm.home)) as another_process:
        strangers = [wrong_secret(another_process.create("x")[0]) for _ in range(20)]
    answers = [realm.ask(strangers[n % 20] if n % 2 else f"garbage{n}").status_code for n in range(200)]
    assert answers[: 5 * FAILURES] == [401] * 5 * FAILURES and set(answers[5 * FAILURES :]) == {429}
    assert realm.ask(realm.key).status_code == 200
    assert realm.ask(realm.ours()).status_code == 200
    assert realm.ask(realm.ours(aud="other")).status_code == 429


def test_API2_the_memory_of_failures_is_bounded(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.verifier.MOST_COUNTED", 50)
    verifier = Verifier(realm.keys, realm.tokens, FAILURES)
    for n in range(200):
        with pytest.raises((Unauthenticated, RateLimited)):
            verifier.verify("garbage", f"198.51.100.{n}")
    assert len(verifier._failures) == 50


def test_section6_a_key_says_where_it_was_made_and_has_one_text(tmp_path: Path) -> None:
    from nexus.access import _checksum

    with closing(KeyRing(tmp_path, environment="live")) as keys:
        text, key = keys.create("ci")
        kind, environment, public, secret, _ = text.split("_")
        assert (kind, environment, public, len(secret)) == ("nx", "live", key.id, 43)
        for body in (f"nx_dev_{public}_{secret}", f"nx_{public}_{secret}"):
            with pytest.raises(Unauthenticated):
                keys.verify(f"{body}_{_checksum(body)}")


def test_section6_a_wrong_checksum_is_refused_without_a_look_up(realm: Realm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyRing, "_reading", lambda self: pytest.fail("the database was asked"))
    last = "0" if realm.key[-1] != "0" else "1"
    for text in (realm.key[:-1] + last, realm.key[:-9], realm.key + "0", realm.key.upper(), "nx_dev_a_b_c"):
        with pytest.raises(Unauthenticated):
            realm.keys.verify(text)


def test_section6_an_unknown_id_and_a_wrong_secret_cost_the_same_look_ups(
    realm: Realm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexus.access import _checksum

    asked: list[str] = []
    reading, compare = KeyRing._reading, hmac.compare_digest
    monkeypatch.setattr(KeyRing, "_reading", lambda self: (asked.append("look"), reading(self))[1])
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: (asked.append("compare"), compare(a, b))[1])
    unknown = realm.key.rpartition("_")[0].replace(realm.principal.credential, "A" * 12)
    costs = []
    for text in (wrong_secret(realm.key), f"{unknown}_{_checksum(unknown)}"):
        realm.clock.seconds += 10
        for _ in range(2):  # as it is first seen, and as it is remembered
            asked.clear()
            with pytest.raises(Unauthenticated):
                realm.keys.verify(text)
            costs.append(list(asked))
    assert costs[:2] == costs[2:] == [["compare", "look", "compare"], ["compare", "compare"]]


def test_section6_production_has_no_development_keys() -> None:
    with pytest.raises(ValidationError, match="VALID_API_KEYS"):
        Access(mode="production", development_keys=(SecretStr("letmein"),))
    assert Access(mode="production").environment == "live" and Access().environment == "dev"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `nexus up` would have started in this home, without starting it; two keys for development are set."""
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VALID_API_KEYS", "canary-one,canary-two")
    instance = bootstrap.Instance(
        "i", 1, "b", "http://127.0.0.1:8000", "127.0.0.1:1", "http://127.0.0.1:2", 3, "/", 0.0
    )
    begun: list[str] = []
    monkeypatch.setattr(running, "ensure_up", lambda *_: begun.append("up") or (instance, "started"))
    return begun


def test_section6_up_says_on_the_terminal_that_development_keys_are_accepted(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = CliRunner().invoke(cli.app, ["up"])
    assert said.exit_code == 0 and started == ["up"]
    assert [line for line in said.stderr.splitlines() if line.startswith("WARNING: 2 development key(s)")]
    assert "VALID_API_KEYS" in said.stderr and "canary" not in said.output
    monkeypatch.delenv("VALID_API_KEYS")
    assert "WARNING" not in CliRunner().invoke(cli.app, ["up"]).output


def test_section6_the_gateway_says_in_the_log_that_it_accepts_development_keys(tmp_path: Path) -> None:
    """In a process of its own, as the gateway's is: it has all of Ray, and its log is its stderr."""
    opened = "from deployments.app import open_keys, load_config; open_keys(load_config()).close()"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NEXUS_")}
    said = []
    for given in ({"VALID_API_KEYS": "canary-one,canary-two"}, {}):
        environment = {**clean, "NEXUS_HOME": str(tmp_path), **given}
        done = subprocess.run(
            [sys.executable, "-c", opened], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        said.append(done.stderr)
    assert "2 development key(s) are accepted" in said[0] and "VALID_API_KEYS" in said[0] and "canary" not in said[0]
    assert "development" not in said[1]


@pytest.mark.parametrize("place", ["environment", "file"])
def test_section6_production_does_not_start_with_development_keys(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "file":
        monkeypatch.delenv("VALID_API_KEYS")
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "nexus.yaml").write_text("access: {development_keys: [canary-one]}\n")
    monkeypatch.setenv("NEXUS_ACCESS__MODE", "production")
    for command in (["up"], ["key", "create", "ci"]):
        refused = CliRunner().invoke(cli.app, command).exception
        assert isinstance(refused, ConfigError) and "VALID_API_KEYS" in refused.message
        assert "canary" not in refused.message
    assert not started and not (tmp_path / "home" / "access.db").exists()


def test_a_token_of_a_development_key_ends_when_the_key_is_no_more_configured(tmp_path: Path) -> None:
    settings = Access(development_keys=(SecretStr("letmein"),))
    with closing(KeyRing(tmp_path, ["letmein"])) as keys:
        tokens = Tokens(keys, tmp_path, settings)
        text, _ = tokens.issue(keys.verify("letmein"))
        assert tokens.verify(text).principal.subject == "development"
    with closing(KeyRing(tmp_path)) as keys, pytest.raises(Unauthenticated):
        Tokens(keys, tmp_path, Access()).verify(text)


@pytest.mark.parametrize(
    "changed",
    [
        {"jwks_file": None}, {"jwks_url": "https://issuer.example/jwks"},
        {"jwks_file": None, "jwks_url": "http://issuer.example/j"},
        {"jwks_file": None, "jwks_url": "file:///etc/passwd"},
        {"jwks_file": None, "jwks_url": "https://a@issuer.example/j"},
        {"jwks_file": None, "jwks_url": "http://127.0.0.1.evil.example/j"},
        {"algorithms": ("HS256",)}, {"algorithms": ()},
        {"algorithms": ("none",)}, {"tenants": ()}, {"tenants": ("a b",)}, {"permissions": ("fly",)}, {"audience": ""},
        {"issuer": ""}, {"lifetime_seconds": 10**6}, {"surprise": 1},
    ],
    ids=str,
)  # fmt: skip
def test_J1_J2_an_issuer_that_is_not_safe_is_not_configured(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        outside(tmp_path / "jwks.json", **changed)


def test_two_issuers_have_two_names(tmp_path: Path) -> None:
    theirs = outside(tmp_path)
    for access in ({"issuers": (theirs, theirs)}, {"issuers": (theirs,), "issuer": OUTSIDE}):
        with pytest.raises(ValidationError, match="one name"):
            Access(**access)


# ── the routes ──────────────────────────────────────────────────────────────────────────────────


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def token_of(door: Door, headers: dict[str, str], **body: Any) -> dict[str, Any]:
    answer = door.client.post("/auth/token", json=body or None, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return dict(answer.json())


def test_a_key_becomes_a_token_that_opens_what_the_key_opens(door: Door) -> None:
    headers = door.headers("acme", "ci", "documents:read", "infer")
    made = token_of(door, headers)
    assert (made["token_type"], made["tenant"], made["permissions"]) == ("Bearer", "acme", ["documents:read", "infer"])
    assert 0 < made["expires_in"] <= 3600
    for path in ("/rag/documents", "/v1/models"):
        assert door.client.get(path, headers=bearer(made["access_token"])).status_code == 200
    assert door.client.get("/v1/models", headers={"x-api-key": made["access_token"]}).status_code == 200


def test_a_token_may_have_less_than_its_key_and_never_more(door: Door) -> None:
    headers = door.headers("acme", "ci", "documents:read", "infer")
    narrow = token_of(door, headers, permissions=["infer"], lifetime_seconds=60)
    assert (narrow["permissions"], narrow["expires_in"]) == (["infer"], 60)
    assert door.client.get("/rag/documents", headers=bearer(narrow["access_token"])).status_code == 403
    for body, status in (
        ({"permissions": ["admin"]}, 403), ({"permissions": ["fly"]}, 422), ({"lifetime_seconds": 3601}, 422),
        ({"lifetime_seconds": 0}, 422), ({"tenant": "other"}, 400), ({"lifetime_seconds": "long"}, 422),
    ):  # fmt: skip
        answer = door.client.post("/auth/token", json=body, headers=headers)
        assert answer.status_code == status, (body, answer.text)


def test_a_token_makes_no_token_so_that_none_renews_itself_for_ever(door: Door) -> None:
    made = token_of(door, door.headers())
    answer = door.client.post("/auth/token", headers=bearer(made["access_token"]))
    assert answer.status_code == 422 and answer.json()["code"] == "key_needed"


def test_J11_over_http_a_token_ends_itself_and_an_administrator_ends_any(door: Door) -> None:
    reader, admin = door.headers("acme", "ci", "documents:read"), door.headers()
    first, second = token_of(door, reader), token_of(door, reader)
    assert door.client.delete("/auth/token", headers=reader).json()["code"] == "token_needed"
    assert door.client.delete(f"/auth/token?jti={second['jti']}", headers=reader).status_code == 403
    assert door.client.delete("/auth/token", headers=bearer(first["access_token"])).json() == {"revoked": first["jti"]}
    assert door.client.get("/rag/documents", headers=bearer(first["access_token"])).status_code == 401
    assert door.client.get("/rag/documents", headers=bearer(second["access_token"])).status_code == 200
    assert door.client.delete(f"/auth/token?jti={second['jti']}", headers=admin).status_code == 200
    assert door.client.get("/rag/documents", headers=bearer(second["access_token"])).status_code == 401


def test_section6_over_http_a_key_is_shown_once_listed_without_its_secret_and_ended(door: Door) -> None:
    admin = door.headers()
    wanted = {"name": "ci", "tenant": "acme", "permissions": ["documents:read"], "requests_per_minute": 9}
    made = door.client.post("/auth/keys", json=wanted, headers=admin)
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    key, secret = made.json()["key"], made.json()["key"].split("_")[3]
    assert made.json() | wanted == made.json()
    assert door.client.get("/rag/documents", headers=bearer(key)).status_code == 200
    assert door.client.post("/auth/keys", json=wanted, headers=bearer(key)).status_code == 403
    token = token_of(door, bearer(key))["access_token"]
    listed = door.client.get("/auth/keys", headers=admin)
    assert secret not in listed.text and "hash" not in listed.text
    (shown,) = [each for each in listed.json()["keys"] if each["id"] == made.json()["id"]]
    assert {**shown, "key": key, "last_used_at": None} == made.json()
    assert door.client.delete(f"/auth/keys/{shown['id']}", headers=admin).json() == {"revoked": shown["id"]}
    assert door.client.delete(f"/auth/keys?id={shown['id']}", headers=admin).status_code == 404
    for credential in (key, token):
        assert door.client.get("/rag/documents", headers=bearer(credential)).status_code == 401


def test_J11_over_http_an_administrator_has_the_keys_of_issuers_read_now(door: Door, tmp_path: Path) -> None:
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps(their_set()))
    tokens = Tokens(door.keys, tmp_path, Access(issuers=(outside(jwks),)))
    client = TestClient(gateway.build(replace(door.lent, tokens=tokens)))
    path, admin = "/auth/issuers/refresh", door.headers()
    assert client.post(path, headers=admin).json() == {
        "issuers": [{"issuer": OUTSIDE, "refreshed": True, "keys": ["e1", "r1"]}]
    }
    jwks.unlink()
    assert client.post(path, headers=admin).json()["issuers"] == [{"issuer": OUTSIDE, "refreshed": False, "keys": []}]
    everything_else = door.headers("acme", "ci", *sorted(PERMISSIONS - {"admin"}))
    assert client.post(path, headers=everything_else).status_code == 403


@pytest.mark.parametrize("verb", ["get", "post", "delete"])
def test_API5_keys_are_for_those_who_administer(door: Door, verb: str) -> None:
    headers = door.headers("acme", "ci", *sorted(PERMISSIONS - {"admin"}))
    body = {"json": {"name": "x"}} if verb == "post" else {}
    path = "/auth/keys?id=x" if verb == "delete" else "/auth/keys"
    assert door.client.request(verb, path, headers=headers, **body).status_code == 403
    assert door.client.request(verb, path, **body).status_code == 401


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ({"role": "admin"}, 400), ({"is_admin": True}, 400), ({"created_at": 0}, 400), ({"id": "x"}, 400),
        ({"key": "nx"}, 400), ({"permissions": ["fly"]}, 422), ({"permissions": "admin"}, 422),
        ({"tenant": "a b"}, 422),
        ({"name": ""}, 422), ({"requests_per_minute": 0}, 422), ({"tokens_per_minute": -1}, 422),
        ({"requests_per_minute": 10**12}, 422), ({"lifetime_seconds": 0}, 422), ({"lifetime_seconds": 1e308}, 422),
        ({"permissions": ["infer"] * 100}, 422), ({"name": "n" * 65}, 422),
    ],
    ids=str,
)  # fmt: skip
def test_API3_a_key_is_made_of_known_fields_within_bounds(door: Door, extra: dict[str, Any], status: int) -> None:
    answer = door.client.post("/auth/keys", json={"name": "ci", **extra}, headers=door.headers())
    assert answer.status_code == status, answer.text


# ── the command line ────────────────────────────────────────────────────────────────────────────


def test_the_command_line_makes_keys_with_limits_and_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
    monkeypatch.setenv("NEXUS_ACCESS__MODE", "production")
    run = CliRunner().invoke
    options = ["--requests-per-minute", "3", "--tokens-per-minute", "50", "--expires", "2999-01-01"]
    made = run(cli.app, ["key", "create", "ci", "--json", *options])
    assert made.exit_code == 0 and json.loads(made.stdout)["key"].startswith("nx_live_")
    (listed,) = json.loads(run(cli.app, ["key", "list", "--json"]).stdout)
    assert (listed["requests_per_minute"], listed["tokens_per_minute"]) == (3, 50)
    assert time.gmtime(listed["expires_at"])[:3] == (2999, 1, 1)
    for wrong in (["--expires", "2001-01-01"], ["--expires", "2999-01-01", "--days", "3"]):
        assert isinstance(run(cli.app, ["key", "create", "ci", *wrong]).exception, InvalidRequest)


@pytest.mark.parametrize(("kids", "told"), [(["r1", "r2"], "r1, r2"), ([], "none"), (None, "did not come")])
def test_J11_the_command_line_has_the_keys_of_issuers_read_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kids: list[str] | None, told: str
) -> None:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
    asked: list[tuple[str, str]] = []
    shown = [{"issuer": OUTSIDE, "refreshed": kids is not None, "keys": kids or []}]

    def call(self: Client, method: str, path: str) -> tuple[int, Any]:
        asked.append((method, path))
        return 200, {"issuers": shown}

    monkeypatch.setattr(Client, "call", call)
    printed = CliRunner().invoke(cli.app, ["key", "refresh"])
    assert printed.exit_code == (kids is None) and printed.stdout.startswith(f"{OUTSIDE}: {told}")
    assert json.loads(CliRunner().invoke(cli.app, ["key", "refresh", "--json"]).stdout) == shown
    assert asked == [("POST", "/auth/issuers/refresh")] * 2
