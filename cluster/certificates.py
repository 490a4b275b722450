"""Certificates of a cluster's machines: its own authority on the head, and who is let in by them.

Ray's machines speak TLS to each other where `ray.tls` is set: each shows a certificate of the cluster's authority, and
who has none, or another's, is not heard. The authority's key stays in the head's home. What another machine needs is
one file, made there for it (`nexus node certificate`) and carried as `ray-token` is. A certificate is for a machine's
address; it is out of use when a new authority is made (`tls/` removed from the head's home, with Nexus down).
"""

import datetime
import ipaddress
import socket
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nexus.errors import ConfigError, InvalidRequest, Unavailable
from nexus.keyring import write_private
from nexus.private_files import require_private

FOLDER = "tls"  # of the home
AUTHORITY_KEY, AUTHORITY, CERTIFICATE, KEY = "authority.key", "authority.pem", "machine.pem", "machine.key"
VALID_DAYS = 3650
CONNECT_SECONDS = 5.0
KEY_WORDS, CERTIFICATE_WORDS = b"PRIVATE KEY-----", b"CERTIFICATE-----"


def make_authority(home: Path) -> None:
    """Once; the key is for signing certificates and stays here."""
    folder = home / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    if (folder / AUTHORITY_KEY).exists():
        return
    key, name = ec.generate_private_key(ec.SECP256R1()), _named("Nexus cluster")
    may_only_sign = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = (
        _begin(name, name, key.public_key(), key.public_key())
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .add_extension(may_only_sign, critical=True)
    )
    write_private(folder / AUTHORITY, _written(builder.sign(key, hashes.SHA256())))
    write_private(folder / AUTHORITY_KEY, _secret(key))


def issue(home: Path, name: str, address: str) -> bytes:
    """Key and certificate for a machine, and the authority's certificate: all that it needs, as one PEM text.

    Raises ConfigError where this home has no authority.
    """
    folder = home / FOLDER
    if not (folder / AUTHORITY_KEY).exists():
        raise ConfigError("there is no authority here: `nexus up` makes one on the head's machine where ray.tls is set")
    require_private(folder / AUTHORITY_KEY)
    authority = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
    signer = serialization.load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _begin(_named(name), authority.subject, key.public_key(), signer.public_key())
        .add_extension(x509.SubjectAlternativeName(_places(address)), critical=False)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _secret(key) + _written(certificate) + _written(authority)


def keep(home: Path, bundle: bytes) -> None:
    """Take what `issue` made. Raises InvalidRequest and ConfigError for something else, and changes nothing then."""
    key, _, rest = bundle.partition(b"-----END " + KEY_WORDS)
    certificates = [f"-----BEGIN {part}" for part in rest.decode(errors="replace").split("-----BEGIN ")[1:]]
    if not key.startswith(b"-----BEGIN ") or len(certificates) != 2:
        raise InvalidRequest("that is no certificate of `nexus node certificate`: a key, and two certificates")
    parts = {
        AUTHORITY: certificates[1].encode(), CERTIFICATE: certificates[0].encode(),
        KEY: key + b"-----END " + KEY_WORDS + b"\n",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=home) as draft:
        _write(Path(draft), parts)
        require_certificate(Path(draft))
    _write(home, parts)


def _write(home: Path, parts: Mapping[str, bytes]) -> None:
    (home / FOLDER).mkdir(mode=0o700, exist_ok=True)
    for file, content in parts.items():
        write_private(home / FOLDER / file, content)


def see_to_own(home: Path, name: str, address: str) -> None:
    """The head's: an authority, and a certificate for its address, made where there is none."""
    make_authority(home)
    try:
        certificate = x509.load_pem_x509_certificate((home / FOLDER / CERTIFICATE).read_bytes())
        places = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((home / FOLDER / AUTHORITY).read_bytes()))
        is_good = list(places) == _places(address)
    except (FileNotFoundError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        is_good = False
    if not is_good:
        keep(home, issue(home, name, address))


def require_certificate(home: Path) -> None:
    """Raises ConfigError where this machine has none that can be used."""
    folder = home / FOLDER
    for file in (AUTHORITY, CERTIFICATE, KEY):
        if not (folder / file).exists():
            raise ConfigError(
                "this machine has no certificate, and ray.tls is set: `nexus node certificate NAME FILE` on the head's"
                " machine makes one; carry it here and say --certificate-file FILE"
            )
        require_private(folder / file)
    try:
        _context(home)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"the certificate in {FOLDER}/ of the home cannot be used: {error}") from None


def end_of(home: Path) -> tuple[datetime.datetime, str]:
    """When this machine's own certificate or that of the authority ends, whichever does first, and its file's name.

    Raises ConfigError where there is none that can be used.
    """
    require_certificate(home)
    read = {name: (home / FOLDER / name).read_bytes() for name in (AUTHORITY, CERTIFICATE)}
    return min((x509.load_pem_x509_certificate(pem).not_valid_after_utc, name) for name, pem in read.items())


def environment(home: Path) -> Mapping[str, str]:
    """What a process needs to speak to Ray. Raises ConfigError."""
    require_certificate(home)
    folder = home / FOLDER
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / CERTIFICATE),
        "RAY_TLS_SERVER_KEY": str(folder / KEY),
        "RAY_TLS_CA_CERT": str(folder / AUTHORITY),
    }


def require_greeting(home: Path, address: str) -> None:
    """Return once the head at HOST:PORT takes this machine's certificate and shows a good one of its own.

    Raises ConfigError where either refuses the other, Unavailable where nothing answers.
    """
    host, _, port = address.rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port)), CONNECT_SECONDS) as plain,
            _context(home).wrap_socket(plain, server_hostname=host) as channel,
        ):
            if channel.recv(1):  # what a server says first; one that refuses ends the connection instead
                return
            why = "the head ended the connection"
    except ssl.SSLError as error:
        why = str(error.reason)
    except OSError:
        raise Unavailable(f"the head at {address} does not answer with TLS: is ray.tls set there, too?") from None
    raise ConfigError(
        f"the head at {address} and this machine do not take each other's certificates ({why}): make this machine"
        " another with `nexus node certificate`, and see that ray.tls is the same everywhere"
    )


def _context(home: Path) -> ssl.SSLContext:
    folder = home / FOLDER
    context = ssl.create_default_context(cafile=str(folder / AUTHORITY))
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    context.set_alpn_protocols(["h2"])
    return context


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        .serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + VALID_DAYS * day)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )  # fmt: skip


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _places(address: str) -> list[x509.GeneralName]:
    """Where others find a machine; its own processes find each other on loopback, too."""
    try:
        own: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(address))]
    except ValueError:
        own = [x509.DNSName(address), x509.IPAddress(ipaddress.ip_address(socket.gethostbyname(address)))]
    return [*own, x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]


def _written(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _secret(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
