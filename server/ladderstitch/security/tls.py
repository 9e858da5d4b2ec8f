"""TLS credentials of a server whose files may be replaced while it runs."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from ladderstitch.errors import ConfigError

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """A PEM chain, its key and, for mutual TLS, the authority of the callers' certificates."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def stamp(self) -> Stamp:
        """Changes whenever a file does; raises `OSError` if one is missing."""
        paths = [self.certificate, self.key, self.client_ca]
        states = [path.stat() for path in paths if path is not None]
        return tuple((state.st_mtime_ns, state.st_ino) for state in states)

    def check(self) -> None:
        """Raises `ConfigError` unless the key fits the certificate and all files are PEM."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"tls_certificate: {self.certificate} with {self.key}"
                f"{f' and {self.client_ca}' if self.client_ca else ''}: {error}"
            ) from error

    def read(self) -> grpc.ServerCertificateConfiguration:
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration(
            [pair], self.client_ca.read_bytes() if self.client_ca else None
        )


class RotatingCertificates:
    """gRPC asks it at every handshake; connections that exist keep what they have."""

    def __init__(self, files: CertificateFiles) -> None:
        """Raises `ConfigError` if the files cannot be used."""
        files.check()
        self.files = files
        self._stamp = files.stamp()
        self._refused: Stamp | None = None
        self._first = files.read()
        self._lock = threading.Lock()

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self.changed,
            require_client_authentication=self.files.client_ca is not None,
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration if the files have changed and fit each other, else None.

        Half-written or mismatched files leave the old certificate in use, with one line in the log.
        """
        with self._lock:
            stamp: Stamp | None = None
            try:
                stamp = self.files.stamp()
                if stamp in (self._stamp, self._refused):
                    return None
                self.files.check()
                configuration = self.files.read()
            except (OSError, ConfigError) as error:
                log.warning("the old certificate stays in use: %s", error)
                self._refused = stamp
                return None
            self._stamp, self._refused = stamp, None
            log.info("certificate %s reread", self.files.certificate)
            return configuration
