"""Who may call what, and how often: API keys, roles, rate limits and quotas; certificates.

A key is shown as NAME.SECRET, once; the file of keys holds a hash of the secret. Its role is the most that it may do:

    read    Embed, Search, Get..., List..., FindDuplicates
    write   that, and items: Upsert, Delete
    admin   that, and collections: create, delete, compact, snapshot; releases
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import ssl
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Literal

import grpc
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import CliPositionalArg

from export.bundle import RefusalError
from service.config import Tls
from service.errors import (
    PermissionDeniedError,
    QueueFullError,
    QuotaError,
    RateLimitedError,
    ServiceError,
    UnauthenticatedError,
)
from service.metrics import Metrics

KEY_NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
_HASH = re.compile(r"sha256:[0-9a-f]{64}|scrypt:\d+:\d+:\d+:[0-9a-f]{32,}:[0-9a-f]{64}")
# scrypt as RFC 7914 and OWASP advise for interactive logins: 16 MiB and some 50 ms.
_SCRYPT = (2**14, 8, 1)
# Secrets that are being hashed with scrypt at one time; more are refused.
_HASHING = 4
# Hashes of secrets that scrypt has let in, so that it is asked once per secret and not once per call.
_REMEMBERED = 1024
_REFLECTION = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")


class Role(StrEnum):
    """The most that a key may do."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"

    def allows(self, needed: Role) -> bool:
        """Whether it may do what needs `needed`."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


# What each method needs; one that is not here needs admin.
ROLES = {
    **dict.fromkeys(
        ("Embed", "StreamEmbed", "GetEncoder", "ListEncoders", "Search", "BatchSearch", "StreamSearch"), Role.READ
    ),
    **dict.fromkeys(("GetCollection", "ListCollections", "GetItem", "ListItems", "FindDuplicates"), Role.READ),
    **dict.fromkeys(("UpsertItems", "StreamUpsert", "DeleteItems"), Role.WRITE),
}


def role_for(method: str) -> Role:
    """What a method, such as likewise.v1.SearchService/Search, needs."""
    service, _, name = method.partition("/")
    return Role.READ if service in _REFLECTION else ROLES.get(name, Role.ADMIN)


class Key(BaseModel):
    """One line of the file of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=f"^{KEY_NAME}$")
    """Who has it; what it does is logged and counted under this name."""
    hash: str
    """sha256:HEX of the secret, or scrypt:N:R:P:SALT:HEX of one that a person chose."""
    role: Role = Role.READ
    """The most that it may do."""
    calls_per_second: float | None = Field(None, gt=0)
    """Calls, searches of a batch and messages of a stream that it may begin in a second, on average."""
    pictures_per_second: float | None = Field(None, gt=0)
    """Pictures that it may have embedded in a second, on average."""
    pictures_per_day: int | None = Field(None, ge=0)
    """Pictures that it may have embedded on one day (UTC), as this server process counts them."""
    expires: datetime | None = None
    """When it ends."""

    @field_validator("hash")
    @classmethod
    def _known(cls, value: str) -> str:
        if not _HASH.fullmatch(value):
            raise ValueError("a hash is sha256:HEX or scrypt:N:R:P:SALT:HEX, as `likewise keys new` prints it")
        return value

    @field_validator("expires")
    @classmethod
    def _utc(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class _KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: list[Key]

    @field_validator("keys")
    @classmethod
    def _unique(cls, keys: list[Key]) -> list[Key]:
        names = [key.name for key in keys]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"two keys have the name {double[0]!r}")
        return keys


def new_secret() -> str:
    """256 random bits, as text."""
    return secrets.token_urlsafe(32)


def hash_of(secret: str, kind: Literal["sha256", "scrypt"] = "sha256") -> str:
    """A secret as the file of keys holds it. sha256 suffices for `new_secret`, which nobody guesses."""
    if kind == "sha256":
        return f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
    n, r, p = _SCRYPT
    salt = secrets.token_bytes(16)
    digest = hashlib.scrypt(secret.encode(), salt=salt, n=n, r=r, p=p, dklen=32)
    return f"scrypt:{n}:{r}:{p}:{salt.hex()}:{digest.hex()}"


def _matches(secret: str, stored: str) -> bool:
    kind, *parts = stored.split(":")
    if kind == "sha256":
        return hmac.compare_digest(hashlib.sha256(secret.encode()).hexdigest(), parts[0])
    n, r, p = map(int, parts[:3])
    digest = hashlib.scrypt(secret.encode(), salt=bytes.fromhex(parts[3]), n=n, r=r, p=p, dklen=32, maxmem=256 * n * r)
    return hmac.compare_digest(digest.hex(), parts[4])


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a YAML or JSON file, by name. Raises `RefusalError`."""
    try:
        read = yaml.safe_load(path.read_text())
        found = _KeyFile.model_validate(read if isinstance(read, dict) else {"keys": read})
    except OSError as e:
        raise RefusalError(f"the keys in {path} cannot be read ({e.strerror}): check the path and its mode") from None
    except (yaml.YAMLError, UnicodeDecodeError):  # neither says a word of the file: there may be secrets in it
        raise RefusalError(
            f"{path} is not YAML or JSON: write a list `keys:` of what `likewise keys new` prints"
        ) from None
    except ValidationError as e:
        first = e.errors(include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RefusalError(
            f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}; write a list `keys:` of what `likewise keys "
            "new` prints"
        ) from None
    if path.stat().st_mode & 0o002:
        raise RefusalError(f"{path} may be written by everybody on this machine: chmod o-w {path}")
    return {key.name: key for key in found.keys}


class Bucket:
    """A token bucket: `rate` a second on average, a second's worth at once. A full bucket grants more than it holds, which
    is paid off before the next: else no large request could pass a low limit."""

    def __init__(self, rate: float) -> None:
        self.rate, self._most = rate, max(1.0, rate)
        self._tokens, self._at = self._most, time.monotonic()

    def take(self, count: float) -> float:
        """0 where `count` were taken, or else the seconds until there are any."""
        now = time.monotonic()
        self._tokens = min(self._most, self._tokens + (now - self._at) * self.rate)
        self._at = now
        if self._tokens < min(count, self._most):
            return (min(count, self._most) - self._tokens) / self.rate
        self._tokens -= count
        return 0.0


class _Use:
    """What a key has used."""

    def __init__(self, key: Key) -> None:
        self.calls = Bucket(key.calls_per_second) if key.calls_per_second else None
        self.pictures = Bucket(key.pictures_per_second) if key.pictures_per_second else None
        self.day = datetime.now(UTC).date()
        self.today = 0


class Guard:
    """Lets calls in. Used from one event loop."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        """Raises `RefusalError`."""
        self._path, self._metrics = path, metrics
        self._keys = read_keys(path)
        self._uses = {name: _Use(key) for name, key in self._keys.items()}
        self._let_in: dict[str, str] = {}  # sha256 of a secret → the scrypt hash that it matched
        self._hashing = 0

    def __len__(self) -> int:
        return len(self._keys)

    def reload(self) -> None:
        """Read the file again: keys that are gone are refused from here on. Raises `RefusalError`, and changes nothing."""
        before, self._keys = self._keys, read_keys(self._path)
        self._uses = {
            name: self._uses[name] if before.get(name) == key else _Use(key) for name, key in self._keys.items()
        }

    async def admit(self, method: str, authorization: str | None) -> Key:
        """The key of a call that may begin. Raises `UnauthenticatedError`, `PermissionDeniedError`, `RateLimitedError`."""
        key = await self._authenticated(authorization)
        needed = role_for(method)
        if not key.role.allows(needed):
            raise PermissionDeniedError(
                f"the key {key.name!r} has the role {key.role}, {method} needs {needed}: use another key", "ROLE_NEEDED",
                key=key.name, role=key.role, needed=needed,
            )  # fmt: skip
        self.charge_calls(key, 1)
        return key

    def charge_calls(self, key: Key, count: int) -> None:
        """Raises `RateLimitedError`."""
        use = self._uses.get(key.name)
        wait = use.calls.take(count) if use is not None and use.calls is not None else 0.0
        if wait:
            self._metrics.rejected.labels(reason="RATE_LIMITED").inc(count)
            raise RateLimitedError(
                f"the key {key.name!r} may begin {key.calls_per_second:g} calls a second: try again in {wait:.2f} s", wait,
                key=key.name, limit=key.calls_per_second,
            )  # fmt: skip

    async def pace(self, key: Key) -> None:
        """Wait until the key may send another message on a stream."""
        use = self._uses.get(key.name)
        while use is not None and use.calls is not None and (wait := use.calls.take(1)):
            await asyncio.sleep(wait)

    def charge_pictures(self, client: str, count: int) -> None:
        """Raises `RateLimitedError`, `QuotaError`."""
        key, use = self._keys.get(client), self._uses.get(client)
        if key is None or use is None:
            return
        now = datetime.now(UTC)
        if use.day != now.date():
            use.day, use.today = now.date(), 0
        if key.pictures_per_day is not None and use.today + count > key.pictures_per_day:
            midnight = datetime.combine(now.date() + timedelta(1), datetime.min.time(), UTC)
            self._metrics.rejected.labels(reason="QUOTA_EXCEEDED").inc(count)
            raise QuotaError(
                f"the key {key.name!r} has had {use.today:,} pictures embedded today, {key.pictures_per_day:,} are allowed: "
                "go on after midnight UTC", (midnight - now).total_seconds(), key=key.name, limit=key.pictures_per_day,
                used=use.today,
            )  # fmt: skip
        wait = use.pictures.take(count) if use.pictures is not None else 0.0
        if wait:
            self._metrics.rejected.labels(reason="RATE_LIMITED").inc(count)
            raise RateLimitedError(
                f"the key {key.name!r} may have {key.pictures_per_second:g} pictures a second embedded: try again in "
                f"{wait:.2f} s", wait, key=key.name, limit=key.pictures_per_second,
            )  # fmt: skip
        use.today += count
        self._metrics.key_pictures.labels(key=key.name).inc(count)

    async def _authenticated(self, authorization: str | None) -> Key:
        scheme, _, token = (authorization or "").partition(" ")
        name, _, secret = token.strip().partition(".")
        if scheme.lower() != "bearer" or not secret:
            raise UnauthenticatedError(
                "this server asks for a key: send the metadata `authorization: Bearer NAME.SECRET`", "KEY_MISSING"
            )
        key = self._keys.get(name)
        stored = key.hash if key is not None else hash_of("")
        if not await self._is_of(secret, stored) or key is None:
            raise UnauthenticatedError("the key is not known here: ask the operator for one", "KEY_UNKNOWN")
        if key.expires is not None and key.expires <= datetime.now(UTC):
            raise UnauthenticatedError(
                f"the key {key.name!r} has expired: ask the operator for another", "KEY_EXPIRED", key=key.name
            )
        return key

    async def _is_of(self, secret: str, stored: str) -> bool:
        if not stored.startswith("scrypt:"):
            return _matches(secret, stored)
        known = hashlib.sha256(secret.encode()).hexdigest()
        if self._let_in.get(known) == stored:
            return True
        if self._hashing >= _HASHING:  # or else whoever guesses would take the processor
            raise QueueFullError("too many keys are being checked: try again shortly", 0.2)
        self._hashing += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(None, _matches, secret, stored)
        finally:
            self._hashing -= 1
        if found:
            if len(self._let_in) >= _REMEMBERED:
                self._let_in.clear()
            self._let_in[known] = stored
        return found


def admin_port_only(method: str) -> ServiceError | None:
    """Why a method is not answered on the port for everybody; None where it is."""
    if role_for(method) is not Role.ADMIN:
        return None
    return PermissionDeniedError(f"{method} is answered on this server's admin port only: call it there", "ADMIN_PORT")


def server_credentials(tls: Tls) -> grpc.ServerCredentials | None:
    """What a port is opened with; None for plain text. Raises `RefusalError`."""
    if tls.certificate is None or tls.key is None or server_context(tls) is None:
        return None
    chain = [(tls.key.read_bytes(), tls.certificate.read_bytes())]
    roots = None if tls.client_ca is None else tls.client_ca.read_bytes()
    return grpc.ssl_server_credentials(chain, roots, require_client_auth=roots is not None)


def server_context(tls: Tls) -> ssl.SSLContext | None:
    """The same for Python's own sockets; gRPC itself would only say that it cannot open the port. Raises `RefusalError`."""
    if tls.certificate is None or tls.key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password="")
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as e:
        raise RefusalError(
            f"the certificate and key do not go together, or are not PEM ({e.reason or e}): check --tls.certificate "
            f"{tls.certificate}, --tls.key (without a password) and --tls.client-ca"
        ) from None
    except OSError as e:
        raise RefusalError(f"a file of --tls cannot be read ({e}): check its path and mode") from None
    return context


def common_name(auth: object) -> str:
    """Of the client's certificate, as `ServicerContext.auth_context` gives it; '' where it showed none."""
    names: Sequence[bytes] = auth.get("x509_common_name", ()) if isinstance(auth, dict) else ()
    return names[0].decode(errors="replace") if names else ""


class KeysNew(BaseModel):
    """Make an API key: its secret is printed once, and a line for the file that `likewise serve --keys` reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: CliPositionalArg[str] = Field(pattern=f"^{KEY_NAME}$")
    """Who is to have it: a-z, 0-9, - and _."""
    role: Role = Role.READ
    """The most that it may do: read, write (items) or admin (collections)."""
    calls_per_second: float | None = Field(None, gt=0)
    """Calls it may begin in a second, on average."""
    pictures_per_second: float | None = Field(None, gt=0)
    """Pictures it may have embedded in a second, on average."""
    pictures_per_day: int | None = Field(None, ge=0)
    """Pictures it may have embedded on one day (UTC)."""
    expires: datetime | None = None
    """When it ends, such as 2027-01-31."""
    ask: bool = False
    """Read the secret from standard input, rather than make one up; it is then kept as scrypt."""

    def cli_cmd(self) -> int:
        """Run the command."""
        secret = sys.stdin.readline().rstrip("\n") if self.ask else new_secret()
        if len(secret) < 12:
            raise RefusalError(f"the secret has {len(secret)} characters: give it 12 or more")
        limits = self.model_dump(mode="json", exclude={"ask", "name", "role"}, exclude_none=True)
        entry = {
            "name": self.name, "hash": hash_of(secret, "scrypt" if self.ask else "sha256"), "role": self.role.value, **limits
        }  # fmt: skip
        print(f"  - {json.dumps(entry)}")
        print(
            f"\nlikewise: the line above goes below `keys:` in the file of keys. The key, shown this once:\n"
            f"\n    {self.name}.{secret if not self.ask else '(the secret that was read)'}\n"
            f"\nIt is sent as the metadata `authorization: Bearer {self.name}.SECRET`.",
            file=sys.stderr,
        )
        return 0
