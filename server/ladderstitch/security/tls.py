"""Certificate files of a server: reading and checking them, and watching them for changes."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

from ladderstitch.errors import ConfigError

log = logging.getLogger(__name__)

FileStamp = tuple[tuple[int, int], ...]
"""Modification time in nanoseconds and inode number of each file."""


@dataclass(frozen=True, slots=True)
class CertificateData:
    """The contents of certificate files, PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Paths of a PEM certificate chain and its key.

    `client_ca` is the authority of the callers' certificates, unset unless TLS is mutual.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def stamp(self) -> FileStamp:
        """Return a value that changes whenever a file does; raises `OSError` if one is missing."""
        paths = [self.certificate, self.key, self.client_ca]
        states = [path.stat() for path in paths if path is not None]
        return tuple((state.st_mtime_ns, state.st_ino) for state in states)

    def check(self) -> None:
        """Raise `ConfigError` unless all files are PEM and the key matches the certificate."""
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

    def read(self) -> CertificateData:
        """Return the contents of the files; raises `OSError` if one cannot be read."""
        return CertificateData(
            self.certificate.read_bytes(),
            self.key.read_bytes(),
            self.client_ca.read_bytes() if self.client_ca else None,
        )


class CertificateWatcher:
    """Certificate files that may be replaced while a server runs; safe to call from any thread."""

    def __init__(self, files: CertificateFiles) -> None:
        """Read the files; raises `ConfigError` if they cannot be used."""
        files.check()
        self.files = files
        self._stamp = files.stamp()
        self.initial = files.read()
        self._rejected: FileStamp | None = None
        self._lock = threading.Lock()

    def read_change(self) -> CertificateData | None:
        """Return the new contents if the files have changed since the last call, else None.

        Half-written or mismatched files are logged once and otherwise ignored, so that the server
        keeps the old certificate.
        """
        with self._lock:
            stamp: FileStamp | None = None
            try:
                stamp = self.files.stamp()
                if stamp in (self._stamp, self._rejected):
                    return None
                self.files.check()
                data = self.files.read()
            except (OSError, ConfigError) as error:
                log.warning("certificate rejected, keeping the old one: %s", error)
                self._rejected = stamp
                return None
            self._stamp, self._rejected = stamp, None
            log.info("certificate %s read again", self.files.certificate)
            return data
