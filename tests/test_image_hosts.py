"""Pictures fetched from allowed hosts, and everything else that a URL can be: of that, not one packet is sent."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpcore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from nexus import image_hosts
from nexus.config import Models
from nexus.errors import InvalidRequest
from nexus.image_hosts import ImageHosts, is_public
from nexus.images import MOST_BYTES, Picture

TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
PUBLIC = "93.184.216.34"
HOST = "pictures.example"
URL = f"https://{HOST}/a.png"
ALLOWED = (HOST, "other.example:8443")


# Without a network


class NoNetwork(httpcore.AsyncNetworkBackend):
    async def connect_tcp(self, host: str, port: int, *options: object, **named: object) -> None:
        raise AssertionError(f"{host}:{port} was connected to")


class Unreachable(httpcore.AsyncNetworkBackend):
    """A network that notes where a connection was wanted, and makes none."""

    def __init__(self) -> None:
        self.wanted: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *options: object, **named: object) -> None:
        self.wanted.append((host, port))
        raise httpcore.ConnectError("no route")


async def no_names(host: str, port: int) -> list[str]:
    raise AssertionError(f"{host!r} was resolved")


def resolving(*answers: list[str]) -> Callable[[str, int], Awaitable[list[str]]]:
    """A resolver that gives these answers in turn, and no further one."""
    left = list(answers)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0)

    return resolve


def refusal_of(hosts: ImageHosts, url: str) -> str:
    with pytest.raises(InvalidRequest) as raised:
        asyncio.run(hosts.fetch(url))
    assert raised.value.code == "url_not_allowed"
    assert url[:51] == url or url[:51] not in raised.value.message
    return raised.value.message


BAD_URLS = [
    "http://169.254.169.254/latest/meta-data/", "https://169.254.169.254/", "https://127.0.0.1/", "https://[::1]/",
    "https://[::ffff:127.0.0.1]/", "https://0.0.0.0/", "https://2130706433/", "https://0x7f.1/", "https://0177.0.0.1/",
    "https://127.1/", "https://localhost/", "https://localhost./", "https://10.0.0.8/", "https://[fd00::1]/",
    "https://100.64.0.1/", "https://[fe80::1%25eth0]/", "file:///etc/passwd", "gopher://pictures.example/",
    "ftp://pictures.example/", "http://pictures.example/", "ws://pictures.example/", "//pictures.example/", "a.png",
    "", "https:", "https://", "https:///a.png", "https:pictures.example/a.png", "javascript:alert(1)",
    "https://good@evil.example/", "https://pictures.example@evil.example/", "https://pictures.example:x@evil.example/",
    "https://user@pictures.example/", "https://user:pass@pictures.example/", "https://@pictures.example/",
    "https://evil.example\\@pictures.example/", "https://pictures.example\\@evil.example/",
    "https://pictures.example\\a.png", "https:\\\\pictures.example/", "https://evil.example#@pictures.example/",
    "https://evil.example?@pictures.example/", "https://pictures.example#@evil.example/",
    "https://pictures.example/#x", "https://pictures.example/a b", "https://pictures.example/\r\nX-Evil: 1",
    "https://pictures.example/a\tb", " https://pictures.example/", "https://pictures.example/ ",
    "https://pictures.example/\n", "https://pictures.example\n/", "https://pictures.example\x00.evil.example/",
    "https://pictures.example%2eevil.example/", "https://pictures.example%00/", "https://pictures.example/ä",
    "https://pictureſ.example/", "https://PICTURES.EXAMPLE。/", "https://xn--pictures.example/",
    "https://pictures.example./", "https://.pictures.example/", "https://sub.pictures.example/",
    "https://pictures.example.evil.example/", "https://evilpictures.example/", "https://example/",
    "https://pictures.example:80/", "https://pictures.example:8443/", "https://pictures.example:/",
    "https://pictures.example:443443/", "https://pictures.example:-1/", "https://pictures.example:٤٤٣/",
    "https://pictures.example:443:443/", "https://other.example/", "https://other.example:443/",
    "https://pictures.example/\ud800", "https://pictures.example/" + "a" * 2048, "https://" + "a" * 300 + ".example/",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_of_another_form_or_host_is_not_even_resolved(url: str) -> None:
    refusal_of(ImageHosts(ALLOWED, resolve=no_names, network=NoNetwork(), certificates=TRUSTS_NOBODY), url)


@pytest.mark.parametrize("url", [*BAD_URLS, URL])
def test_by_default_nothing_is_resolved(url: str) -> None:
    refusal_of(ImageHosts(resolve=no_names, network=NoNetwork(), certificates=TRUSTS_NOBODY), url)


PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255",
    "192.168.0.1", "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:93.184.216.34", "::ffff:0:127.0.0.1", "::127.0.0.1", "::93.184.216.34",
    "fe80::1", "fe80::1%eth0", "2606:4700::1111%eth0", "fc00::1", "fd00::1", "fec0::1", "ff02::1", "ff0e::1", "100::1",
    "64:ff9b::7f00:1", "64:ff9b::5db8:d822", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:5db8:d822::1",
    "2001::1", "2001:0:5db8:d822::1", "2001:db8::1", "2001:2::1", "2001:10::1",
    "", "localhost", "pictures.example", "2130706433", "0x7f.1", "127.1", "93.184.216.34:443", "[::1]",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_with_one_address_that_is_not_public_is_not_connected_to(address: str) -> None:
    assert not is_public(address)
    for addresses in ([address], [PUBLIC, address], [address, PUBLIC]):
        refusal_of(
            ImageHosts(ALLOWED, resolve=resolving(addresses), network=NoNetwork(), certificates=TRUSTS_NOBODY), URL
        )


def test_a_name_without_addresses_is_not_connected_to() -> None:
    refusal_of(ImageHosts(ALLOWED, resolve=resolving([]), network=NoNetwork(), certificates=TRUSTS_NOBODY), URL)

    async def fail(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    assert "no such name" not in refusal_of(
        ImageHosts(ALLOWED, resolve=fail, network=NoNetwork(), certificates=TRUSTS_NOBODY), URL
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "127.1", "0177.0.0.1", "0.0.0.0", "10.0.0.8"])
def test_an_address_is_not_public_because_someone_allowed_it(host: str) -> None:
    refusal_of(ImageHosts([host], network=NoNetwork(), certificates=TRUSTS_NOBODY), f"https://{host}/")


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "2a00:1450:4001::200e"])
def test_the_connection_goes_to_the_address_that_was_looked_at(address: str) -> None:
    assert is_public(address)
    network = Unreachable()
    # Whoever resolved a second time would get the private address.
    hosts = ImageHosts(
        ALLOWED, resolve=resolving([address, PUBLIC], ["127.0.0.1"]), network=network, certificates=TRUSTS_NOBODY
    )
    refusal_of(hosts, "HTTPS://Other.Example:8443/a.png?x=https://evil.example/@1")
    assert network.wanted == [(address, 8443)]


@pytest.mark.parametrize("host", ["https://a.example", "a.example/", "*.example", "A.example", "", "a:0", "a:", ":443",
                                  "a.example:443443", "user@a.example", "[::1]", "a b"])  # fmt: skip
def test_a_setting_that_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ValidationError, match="image_hosts"):
        Models(image_hosts=(host,))
    assert Models(image_hosts=ALLOWED).image_hosts == ALLOWED


# With a server on this machine, which the network takes for the public address


class Local(httpcore.AsyncNetworkBackend):
    """A network in which every address leads to one port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.wanted: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *options: object, **named: object) -> httpcore.AsyncNetworkStream:
        self.wanted.append((host, port))
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port)


class Authority:
    """A certificate for some names that signs itself, and who trusts it."""

    def __init__(self, folder: Path, *names: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "of a test")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False)
            .add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256())
        )  # fmt: skip
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = folder / "server.pem"
        file.write_bytes(pem + secret)
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(file)
        self.client = ssl.create_default_context(cadata=pem.decode())


def answer(status: int = 200, body: bytes = b"", **headers: str) -> bytes:
    head = {"Content_Type": "image/png", "Content_Length": str(len(body)), **headers}
    lines = [f"HTTP/1.1 {status} X", *(f"{name.replace('_', '-')}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class Site:
    """A TLS server that plays answers in turn; one that ends in `HANG` is never ended."""

    HANG = b"<hang>"

    def __init__(self, authority: Authority, *answers: bytes) -> None:
        self.authority, self.answers = authority, list(answers)
        self.heads: list[str] = []
        self.names: list[str | None] = []
        self._visits: list[asyncio.Task[None]] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._visits.append(asyncio.current_task())
        try:
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            said = self.answers.pop(0)
            writer.write(said.removesuffix(self.HANG))
            await writer.drain()
            if said.endswith(self.HANG):
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def opened(self) -> Iterator[int]:
        def note(connection: object, name: str | None, context: object) -> None:
            self.names.append(name)

        self.authority.server.sni_callback = note
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.authority.server)
        async with server:
            yield server.sockets[0].getsockname()[1]
            await asyncio.gather(*self._visits)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), *(host.partition(":")[0] for host in ALLOWED))


def visit(
    site: Site, url: str = URL, certificates: ssl.SSLContext | None = None, seconds: float = 60,
    addresses: tuple[str, ...] = (PUBLIC,) * 9,
) -> tuple[Picture | InvalidRequest, Local]:  # fmt: skip
    async def run() -> tuple[Picture | InvalidRequest, Local]:
        async with site.opened() as port:
            network = Local(port)
            hosts = ImageHosts(
                ALLOWED, certificates=certificates or site.authority.client, network=network, seconds=seconds,
                resolve=resolving(*([address] for address in addresses)),
            )  # fmt: skip
            try:
                return await hosts.fetch(url), network
            except InvalidRequest as refusal:
                assert refusal.code == "url_not_allowed"
                return refusal, network

    return asyncio.run(run())


def test_a_picture_of_an_allowed_host_is_fetched(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    site = Site(authority, answer(200, b"abc", Content_Type="Image/PNG; q=1"))
    picture, network = visit(site, URL + "?size=1")
    assert picture == Picture("image/png", b"abc")
    assert network.wanted == [(PUBLIC, 443)] and site.names == [HOST]
    lines = site.heads[0].lower().splitlines()
    assert lines[0] == "get /a.png?size=1 http/1.1" and f"host: {HOST}" in lines
    names = {line.partition(":")[0] for line in lines[1:] if line}
    assert names == {"host", "accept", "accept-encoding", "user-agent"}


def test_a_port_is_part_of_what_is_allowed(authority: Authority) -> None:
    site = Site(authority, answer(200, b"abc", Content_Type="image/gif"))
    picture, network = visit(site, "https://OTHER.example:8443")
    assert picture == Picture("image/gif", b"abc") and network.wanted == [(PUBLIC, 8443)]
    assert site.heads[0].startswith("GET / HTTP") and "host: other.example:8443" in site.heads[0].lower()


def test_redirects_are_followed_among_allowed_hosts(authority: Authority) -> None:
    moved = [
        answer(301, Location="/b.png", Set_Cookie="a=b"), answer(307, Location="https://other.example:8443/c.png?d"),
        answer(302, Location=f"//{HOST}/e.png"),
    ]  # fmt: skip
    site = Site(authority, *moved, answer(200, b"abc"))
    picture, network = visit(site)
    assert picture == Picture("image/png", b"abc")
    assert [head.partition(" HTTP")[0] for head in site.heads] == [
        "GET /a.png",
        "GET /b.png",
        "GET /c.png?d",
        "GET /e.png",
    ]
    assert site.names == [HOST, HOST, "other.example", HOST]
    assert "cookie" not in "".join(site.heads).lower()
    assert network.wanted == [(PUBLIC, port) for port in (443, 443, 8443, 443)]


@pytest.mark.parametrize(
    "location",
    [
        "http://pictures.example/a.png", "https://127.0.0.1/", "http://169.254.169.254/", "https://evil.example/",
        "//evil.example/", "file:///etc/passwd", "https://pictures.example@evil.example/", "https://[::1", "/a#b",
        "https://pictures.example:8443/", "data:image/png;base64,AAAA", "\\\\evil.example\\a", "/ä",
    ],
)  # fmt: skip
def test_a_redirect_to_elsewhere_is_not_followed(authority: Authority, location: str) -> None:
    site = Site(authority, answer(302, Location=location), answer(200, b"abc"))
    refusal, network = visit(site)
    assert isinstance(refusal, InvalidRequest) and "no picture is fetched" in refusal.message
    assert len(network.wanted) == len(site.heads) == 1
    assert location not in refusal.message


def test_each_redirect_is_resolved_and_checked_again(authority: Authority) -> None:
    site = Site(authority, answer(302, Location="/b"), answer(200, b"abc"))
    refusal, network = visit(site, addresses=(PUBLIC, "127.0.0.1"))
    assert isinstance(refusal, InvalidRequest)
    assert network.wanted == [(PUBLIC, 443)] and len(site.heads) == 1


def test_a_fourth_redirect_is_one_too_many(authority: Authority) -> None:
    site = Site(authority, *(answer(302, Location=f"/{n}") for n in range(100)))
    refusal, network = visit(site)
    assert isinstance(refusal, InvalidRequest) and "redirects" in refusal.message
    assert len(network.wanted) == len(site.heads) == 4


CHUNK = b"100000\r\n" + bytes(2**20) + b"\r\n"


@pytest.mark.parametrize(
    "said",
    [
        answer(404), answer(500), answer(401), answer(204), answer(206, b"abc"), answer(304), answer(302),
        answer(200, b"abc", Content_Type="text/html"), answer(200, b"abc", Content_Type="image/svg+xml"),
        answer(200, b"abc", Content_Type=""), answer(200, b"abc", Content_Encoding="gzip"),
        answer(200, b"abc", Content_Length="9"), b"hello\r\n\r\n", b"", answer(200, b"", X="a" * 200_000),
        b"HTTP/1.1 200 X\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK * 21 + Site.HANG,
    ],
)  # fmt: skip
def test_an_answer_that_brings_no_picture_is_refused(authority: Authority, said: bytes) -> None:
    refusal, _ = visit(Site(authority, said))
    assert isinstance(refusal, InvalidRequest)


def test_a_body_of_the_largest_size_is_taken_and_one_byte_more_is_not(authority: Authority) -> None:
    picture, _ = visit(Site(authority, answer(200, bytes(MOST_BYTES))))
    assert isinstance(picture, Picture) and len(picture.content) == MOST_BYTES
    refusal, _ = visit(Site(authority, answer(200, bytes(MOST_BYTES + 1))))
    assert isinstance(refusal, InvalidRequest) and "20 MiB" in refusal.message


@pytest.mark.parametrize("said", [Site.HANG, answer(200, b"abc", Content_Length="9") + Site.HANG])
def test_a_server_that_never_ends_is_left(authority: Authority, said: bytes) -> None:
    refusal, _ = visit(Site(authority, said), seconds=0.3)
    assert isinstance(refusal, InvalidRequest) and "within 0.3 s" in refusal.message


def test_a_resolver_that_never_ends_is_left() -> None:
    async def hang(host: str, port: int) -> list[str]:
        return await asyncio.Future()

    assert "within 0.1 s" in refusal_of(
        ImageHosts(ALLOWED, resolve=hang, network=NoNetwork(), certificates=TRUSTS_NOBODY, seconds=0.1), URL
    )


def test_a_certificate_must_be_trusted_and_of_that_name(authority: Authority, tmp_path: Path) -> None:
    site = Site(authority, answer(200, b"abc"))
    refusal, _ = visit(site, certificates=httpcore.default_ssl_context())
    assert isinstance(refusal, InvalidRequest) and site.heads == []
    of_another = Authority(tmp_path, "another.example", PUBLIC)
    site = Site(of_another, answer(200, b"abc"))
    refusal, _ = visit(site)
    assert isinstance(refusal, InvalidRequest) and site.heads == []


def test_what_is_trusted_by_default_checks_names() -> None:
    context = ImageHosts(ALLOWED)._certificates
    assert context is not None and context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED


def test_the_real_resolver_gives_every_address() -> None:
    assert asyncio.run(image_hosts.resolve("127.0.0.1", 443)) == ["127.0.0.1"]
    assert asyncio.run(image_hosts.resolve("0x7f.1", 443)) == ["127.0.0.1"]
