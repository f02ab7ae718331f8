"""An attempt's TLS material, used by the ssl module as distributed uses it."""

import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from influence_operator.cluster.certificates import attempt_material

NOW = datetime.now(UTC).replace(microsecond=0)
END = NOW + timedelta(days=7)


def context(directory: Path, material: dict[str, str], purpose: ssl.Purpose) -> ssl.SSLContext:
    """As `distributed.security` makes it: both sides show a certificate of the CA, no host name counts."""
    directory.mkdir()
    for name, text in material.items():
        (directory / name).write_text(text)
    made = ssl.create_default_context(purpose, cafile=str(directory / "ca.crt"))
    made.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return made


def meet(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """What a client reads from a server over TLS."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        try:
            with server.wrap_socket(connection, server_side=True) as secured:
                secured.sendall(b"hello")
        except (ssl.SSLError, ConnectionError):
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with (
            socket.create_connection(listener.getsockname()) as raw,
            client.wrap_socket(raw) as secured,
        ):
            return secured.recv(5)
    finally:
        thread.join()
        listener.close()


def test_one_certificate_serves_both_sides_of_a_connection(tmp_path):
    material = attempt_material("digits-12345-1", NOW, END)
    server = context(tmp_path / "server", material, ssl.Purpose.CLIENT_AUTH)
    client = context(tmp_path / "client", material, ssl.Purpose.SERVER_AUTH)

    assert meet(server, client) == b"hello"


def test_another_attempts_certificate_is_refused(tmp_path):
    ours = attempt_material("digits-12345-1", NOW, END)
    theirs = attempt_material("digits-12345-1", NOW, END)
    server = context(tmp_path / "server", ours, ssl.Purpose.CLIENT_AUTH)
    stranger = context(tmp_path / "client", theirs | {"ca.crt": ours["ca.crt"]}, ssl.Purpose.SERVER_AUTH)

    with pytest.raises((ssl.SSLError, ConnectionError)):
        meet(server, stranger)


def test_it_is_valid_from_an_hour_ago_to_the_given_end():
    material = attempt_material("digits-12345-1", NOW, END)
    for name in ("ca.crt", "tls.crt"):
        certificate = x509.load_pem_x509_certificate(material[name].encode())
        assert certificate.not_valid_before_utc == NOW - timedelta(hours=1)
        assert certificate.not_valid_after_utc == END


def test_the_authoritys_key_is_not_handed_out():
    material = attempt_material("digits-12345-1", NOW, END)
    authority = x509.load_pem_x509_certificate(material["ca.crt"].encode())
    certificate = x509.load_pem_x509_certificate(material["tls.crt"].encode())

    assert set(material) == {"ca.crt", "tls.crt", "tls.key"}
    assert authority.public_key() != certificate.public_key()
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_longest_name_of_an_attempt_fits():
    assert attempt_material("j" * 40 + "-12345-1000000", NOW, END)
