"""The server's TLS: certificate, key and the authority of its clients, read again when their files change."""

import logging
import ssl
from pathlib import Path

import grpc

from tq_store.config import ServerConfig
from tq_store.errors import ConfigError
from tq_store.rpc.token import file_version

logger = logging.getLogger(__name__)


class TlsFiles:
    """What each handshake uses. Connections that stand keep what they began with.

    Files are looked at by every handshake. Those that do not fit together, as in the middle of a replacement,
    change nothing until they do.

    Args:
        cert: Certificate chain, PEM.
        key: Its private key, PEM.
        client_ca: Clients must show a certificate signed by it, PEM; None to ask for none.

    Raises:
        ConfigError: They cannot be used.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._files = (cert, key, *([client_ca] if client_ca else ()))
        self._versions = self._read_versions()
        self._configuration = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """For a grpc server's port."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._refresh,  # type: ignore[arg-type]  # the stubs forgot that it may answer None
            require_client_authentication=len(self._files) > 2,
        )

    def context(self) -> ssl.SSLContext:
        """For the next handshake on a socket. Not beside `credentials`: each notices a change of its own."""
        self._refresh()
        return self._context

    def _refresh(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by grpc before each handshake, in a thread of its own; None for no change."""
        versions = self._read_versions()
        if versions == self._versions:
            return None
        self._versions = versions
        try:
            self._configuration = self._load()
        except ConfigError as error:
            logger.warning("the certificate stays as it was: %s", error)
            return None
        logger.info("the certificate was read again from %s", self._files[0])
        return self._configuration

    def _read_versions(self) -> list[tuple[int, int, int] | None]:
        return [file_version(file) for file in self._files]

    def _load(self) -> grpc.ServerCertificateConfiguration:
        cert, key, *authorities = contents = [_read(file) for file in self._files]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nothing is sent that was not asked for, and no session resumed
        try:
            context.load_cert_chain(self._files[0], self._files[1], password="")
            for authority in authorities:
                context.load_verify_locations(cadata=authority.decode("ascii"))
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:  # an SSLError is an OSError, and so is a file that has gone
            raise ConfigError(
                f"the TLS files may not fit together: {', '.join(str(file) for file in self._files)}"
            ) from error
        if contents != [_read(file) for file in self._files]:
            raise ConfigError(f"{self._files[0]} and its key are being replaced just now")
        self._context = context
        return grpc.ssl_server_certificate_configuration(
            [(key, cert)], root_certificates=authorities[0] if authorities else None
        )


def tls_files(config: ServerConfig) -> TlsFiles | None:
    """What a server encrypts with on one of its ports, or None for a server without TLS.

    Raises:
        ConfigError: A file cannot be used.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    return TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
