"""A tenants file that tests write and change while a server watches it."""

import os
from pathlib import Path
from typing import Any

from tq_store.client import StoreClient
from tq_store.config import ClientConfig
from tq_store.server.tokens import new_token


class TenantsFile:
    """Tenants, each with a token, in `path`; written anew by every change."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "tenants.toml"
        self.tokens: dict[str, str] = {}
        self._directory = directory
        self._entries: dict[str, list[str]] = {}
        self._fields: dict[str, dict[str, Any]] = {}

    def add(self, name: str, **fields: Any) -> str:
        """Declare a tenant with these fields of the file, or give one that is there another token."""
        self.tokens[name], entry = new_token()
        self._entries.setdefault(name, []).append(str(entry))
        self._fields.setdefault(name, {}).update(fields)
        self.write()
        return self.tokens[name]

    def remove(self, name: str) -> None:
        del self._entries[name]
        self.write()

    def drop_oldest_token(self, name: str) -> None:
        self._entries[name].pop(0)
        self.write()

    def write(self, text: str | None = None) -> None:
        """Replace the file, as an editor or a mounted secret does."""
        lines = []
        for name, entries in self._entries.items():
            lines += [f'["{name}"]', f"tokens = {entries!r}"]
            for field, value in self._fields[name].items():
                lines.append(f"{field} = {str(value).lower() if isinstance(value, bool) else repr(value)}")
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join(lines) if text is None else text)
        fresh.chmod(0o600)
        os.replace(fresh, self.path)

    def client(self, address: str, name: str, *, token: str | None = None, **settings: Any) -> StoreClient:
        """A client that shows the newest token of a tenant, or this one."""
        file = self._directory / f"{name}-{len(os.listdir(self._directory))}.token"
        file.write_text(token or self.tokens[name])
        file.chmod(0o600)
        return StoreClient(address, config=ClientConfig(token_file=file, max_attempts=1, **settings))

    def metadata(self, name: str) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.tokens[name]}")]
