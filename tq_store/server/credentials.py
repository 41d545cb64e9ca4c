"""Who a token stands for, kept up to date while the file with the tokens changes."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tq_store.block import verify_block
from tq_store.errors import ConfigError
from tq_store.keys import BlockKey
from tq_store.rpc.token import METADATA_KEY, file_version, load_tokens
from tq_store.server.calls import ANYBODY, Identity
from tq_store.server.tenants import SOLE_TENANT, Tenant, Tenants, load_tenants
from tq_store.server.tokens import TokenEntry, matches, parse_entry, token_id_of

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_BEARER = "Bearer "


class Directory(Protocol):
    """Everybody who may call, at one time. Immutable."""

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """By name; empty for a server without a tenants file."""

    def identify(self, token: str | None) -> Identity | None:
        """Whom a token stands for, or None for nobody."""

    def verify(self, block: bytes, key: BlockKey) -> object:
        """Check a block of the store against its key; raises BlockFormatError."""


class OpenDirectory:
    """No token is demanded."""

    tenants: Mapping[str, Tenant] = {}

    def identify(self, _token: str | None) -> Identity | None:
        """Anybody."""
        return ANYBODY

    def verify(self, block: bytes, key: BlockKey) -> object:
        """The block's key is the store's."""
        return verify_block(block, key)


class SharedDirectory(OpenDirectory):
    """A token file: everybody who shows one of its tokens is the one tenant.

    Args:
        lines: Tokens, or entries that `tq-store token new` prints for them. In logs an entry goes by its id,
            a token by its line.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        # hashes, so that all are of one length and no token stays in memory
        self._digests: dict[str, bytes] = {}
        self._entries: dict[str, TokenEntry] = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_entry(line)
            except ValueError:
                self._digests[str(number)] = _digest(line)
            else:
                self._entries[entry.id] = entry

    def identify(self, token: str | None) -> Identity | None:
        """The one tenant, or nobody; compares with all, so that the time does not tell which came close."""
        token_id, shown = token_id_of(token or "") or "", _digest(token or "")
        fitting = [line for line, digest in self._digests.items() if hmac.compare_digest(shown, digest)]
        if matches(token or "", self._entries.get(token_id)):
            fitting.append(token_id)
        return Identity(tenant=SOLE_TENANT, token_id=fitting[0]) if fitting and token else None


class TenantDirectory:
    """A tenants file: each token stands for one tenant.

    Args:
        tenants: Of the file.
    """

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self.tenants: Mapping[str, Tenant] = tenants.by_name

    def identify(self, token: str | None) -> Identity | None:
        """The tenant whose token it is."""
        found = self._tenants.of_token(token_id_of(token or "") or "")
        if not matches(token or "", found[1] if found else None) or found is None:
            return None
        return Identity(tenant=found[0], token_id=found[1].id)

    def verify(self, block: bytes, key: BlockKey) -> object:
        """The block's key is the one that its tenant knows."""
        return self._tenants.verify(block, key)


class Credentials:
    """The directory of a server, read again whenever its file changes.

    A file that cannot be used any more changes nothing: those who could call still can, and a warning says
    why. Calls in flight keep the identity that they began with.

    Args:
        token_file: Tokens that all stand for the one tenant.
        tenants_file: Tenants with tokens of their own; not both.
        on_reload: Told ``ok`` or ``failed`` whenever a changed file was read.

    Raises:
        ConfigError: The file cannot be used.
    """

    def __init__(
        self,
        *,
        token_file: Path | None = None,
        tenants_file: Path | None = None,
        on_reload: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._token_file = token_file
        self._tenants_file = tenants_file
        self._on_reload = on_reload
        self._version = self._file_version()
        self.directory = self._load()

    def identify(self, metadata: Sequence[tuple[str, str | bytes]]) -> Identity | None:
        """Whom the metadata of a call stand for; they must show exactly one token, where one is demanded."""
        shown = [value for name, value in metadata if name == METADATA_KEY]
        value = shown[0] if len(shown) == 1 else ""
        text = value if isinstance(value, str) else value.decode("ascii", "replace")
        token = text.removeprefix(_BEARER) if text.startswith(_BEARER) else None
        return self.directory.identify(token)

    def verify(self, block: bytes, key: BlockKey) -> object:
        """Check a block of the store against its key; raises BlockFormatError."""
        return self.directory.verify(block, key)

    def reload(self) -> None:
        """Read the file again, whether it has changed or not."""
        self._version = self._file_version()
        try:
            self.directory = self._load()
        except ConfigError as error:
            logger.warning("the tokens that were valid stay so: %s", error)
            self._on_reload("failed")
            return
        logger.info("tokens were read again from %s", self._file)
        self._on_reload("ok")

    async def watch(self) -> None:
        """Read the file again within about a second of each change, until cancelled."""
        while self._file is not None:
            await asyncio.sleep(_POLL_S)
            if self._file_version() != self._version:
                await asyncio.to_thread(self.reload)

    @property
    def _file(self) -> Path | None:
        return self._token_file or self._tenants_file

    def _file_version(self) -> tuple[int, int, int] | None:
        return file_version(self._file) if self._file else None

    def _load(self) -> Directory:
        if self._tenants_file is not None:
            return TenantDirectory(load_tenants(self._tenants_file))
        if self._token_file is not None:
            return SharedDirectory(load_tokens(self._token_file))
        return OpenDirectory()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()
