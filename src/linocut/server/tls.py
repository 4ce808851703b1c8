"""A certificate for a server on the LAN, from an authority that is made for it and thrown away.

Browsers install a page as an app only over https that they trust. The authority's certificate (`/ca.crt`) can be added
to a phone by hand; its key is never written, so it can vouch for nothing but this one server.
"""

import ipaddress
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from linocut.server.link import lan_address

if TYPE_CHECKING:
    from cryptography import x509

DAYS = 397  # the longest that browsers accept
RENEW_DAYS = 30


def certificate(folder: Path, host: str) -> tuple[Path, Path, Path]:
    """Return the paths of certificate, key and authority in `folder`, made anew if they are old or name other hosts."""
    paths = folder / "server.crt", folder / "server.key", folder / "ca.crt"
    names = sorted({"localhost", "127.0.0.1", "::1", socket.gethostname(), f"{socket.gethostname()}.local",
                    lan_address(), *([] if host in ("0.0.0.0", "::") else [host])})
    if not _usable(paths, names):
        _make(paths, names)
    return paths


def _usable(paths: tuple[Path, Path, Path], names: list[str]) -> bool:
    from cryptography import x509
    if not all(path.is_file() for path in paths):
        return False
    try:
        found = x509.load_pem_x509_certificate(paths[0].read_bytes())
        stated = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    fresh = found.not_valid_after_utc > datetime.now(UTC) + timedelta(days=RENEW_DAYS)
    return fresh and {str(name.value) for name in stated} >= set(names)


def _make(paths: tuple[Path, Path, Path], names: list[str]) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])

    def begin(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
                .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
                .not_valid_after(now + timedelta(days=DAYS)))

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = named(f"linocut on {socket.gethostname()}")
    authority = (begin(issuer, authority_key)
                 .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                 .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, digital_signature=False,
                                              content_commitment=False, key_encipherment=False, data_encipherment=False,
                                              key_agreement=False, encipher_only=False, decipher_only=False),
                                critical=True)
                 .sign(authority_key, hashes.SHA256()))
    leaf = (begin(named("linocut"), key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
            .sign(authority_key, hashes.SHA256()))
    pem = serialization.Encoding.PEM
    paths[0].parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for path, data in zip(paths, (leaf.public_bytes(pem), secret, authority.public_bytes(pem)), strict=True):
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)


def _name(text: str) -> "x509.GeneralName":
    from cryptography import x509
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
