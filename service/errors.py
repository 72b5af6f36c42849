"""What can go wrong, and how the API says it.

    ServiceError                          code                  reason
    ├── InvalidArgumentError              INVALID_ARGUMENT      BAD_REQUEST, or a picture's own reason
    ├── NotFoundError                     NOT_FOUND             COLLECTION_NOT_FOUND, ITEM_NOT_FOUND, ORIGINAL_NOT_FOUND
    ├── AlreadyExistsError                ALREADY_EXISTS        COLLECTION_EXISTS, SNAPSHOT_EXISTS
    ├── MismatchError                     FAILED_PRECONDITION   MODEL_INDEX_MISMATCH
    ├── PreconditionError                 FAILED_PRECONDITION   COLLECTIONS_FIXED, ...
    ├── QueueFullError                    RESOURCE_EXHAUSTED    QUEUE_FULL (RetryInfo)
    │   └── RateLimitedError              RESOURCE_EXHAUSTED    RATE_LIMITED (RetryInfo)
    ├── QuotaError                        RESOURCE_EXHAUSTED    QUOTA_EXCEEDED (RetryInfo)
    ├── UnauthenticatedError              UNAUTHENTICATED       KEY_MISSING, KEY_UNKNOWN, KEY_EXPIRED
    ├── PermissionDeniedError             PERMISSION_DENIED     ROLE_NEEDED, ADMIN_PORT
    ├── DiskFullError                     RESOURCE_EXHAUSTED    DISK_FULL
    ├── ExpiredError                      DEADLINE_EXCEEDED     EXPIRED_IN_QUEUE
    ├── UnavailableError                  UNAVAILABLE           DRAINING, ENCODER_UNHEALTHY (RetryInfo)
    ├── DataLossError                     DATA_LOSS             INDEX_CHECKSUM, ORIGINAL_CHECKSUM, ORIGINAL_MISSING
    └── InternalError                     INTERNAL              INTERNAL

Messages are whole sentences; every variable in one is also in `metadata` (AIP-193).
"""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status

from export.preprocess import UnreadablePictureError

DOMAIN = "likewise"
# Bytes of a message, and of a variable in it: clients refuse trailing metadata of more than 8 KiB, in which all of it stands
# up to three times, percent-encoded or in base64.
_MESSAGE, _VARIABLE = 1000, 200


class ServiceError(Exception):
    """Base of everything that the API answers with."""

    is_refusal = True
    code: int = Code.INTERNAL
    default_reason = "INTERNAL"
    retry_seconds: float | None = None

    def __init__(self, message: str, reason: str | None = None, field: str = "", **metadata: object) -> None:
        super().__init__(message)
        #: UPPER_SNAKE word that programs branch on
        self.reason = reason or self.default_reason
        #: path of the offending request field, where there is one
        self.field = field
        #: the message's variables
        self.metadata = {name: str(value) for name, value in metadata.items()}

    def status(self) -> Status:
        """google.rpc.Status with ErrorInfo and the detail that fits."""
        message = _short(str(self), _MESSAGE)
        metadata = {name: _short(value, _VARIABLE) for name, value in self.metadata.items()}
        status = Status(code=self.code, message=message)
        status.details.append(_pack(details.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=metadata)))
        if self.field:
            violation = details.BadRequest.FieldViolation(field=self.field, description=message, reason=self.reason)
            status.details.append(_pack(details.BadRequest(field_violations=[violation])))
        if self.retry_seconds is not None:
            delay = Duration()
            delay.FromMilliseconds(int(self.retry_seconds * 1000))
            status.details.append(_pack(details.RetryInfo(retry_delay=delay)))
        return status


class InvalidArgumentError(ServiceError):
    """The request can never succeed as it is."""

    code = Code.INVALID_ARGUMENT
    default_reason = "BAD_REQUEST"


class NotFoundError(ServiceError):
    """A collection or an item does not exist."""

    code = Code.NOT_FOUND
    default_reason = "ITEM_NOT_FOUND"

    def __init__(self, message: str, kind: str, name: str) -> None:
        super().__init__(message, f"{kind.upper()}_NOT_FOUND", **{kind: name})
        self._resource = details.ResourceInfo(
            resource_type=kind, resource_name=_short(name, _VARIABLE), description=_short(message, _MESSAGE)
        )

    def status(self) -> Status:
        """Adds ResourceInfo."""
        status = super().status()
        status.details.append(_pack(self._resource))
        return status


class AlreadyExistsError(ServiceError):
    """A collection of that name exists."""

    code = Code.ALREADY_EXISTS
    default_reason = "COLLECTION_EXISTS"


class PreconditionError(ServiceError):
    """The server's state forbids it."""

    code = Code.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class MismatchError(PreconditionError):
    """Vectors of another encoder."""

    default_reason = "MODEL_INDEX_MISMATCH"

    def __init__(self, message: str, found: str, expected: str) -> None:
        super().__init__(message, found_space_id=found, expected_space_id=expected)

    def status(self) -> Status:
        """Adds PreconditionFailure."""
        status = super().status()
        violation = details.PreconditionFailure.Violation(
            type=self.reason, subject=self.metadata["expected_space_id"], description=_short(str(self), _MESSAGE)
        )
        status.details.append(_pack(details.PreconditionFailure(violations=[violation])))
        return status


class QueueFullError(ServiceError):
    """Too much work is waiting."""

    code = Code.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_seconds: float = 0.5, **metadata: object) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        self.metadata = {name: str(value) for name, value in metadata.items()}


class RateLimitedError(QueueFullError):
    """More than a key may have at once."""

    default_reason = "RATE_LIMITED"


class QuotaError(ServiceError):
    """More than a key may have today: a stream does not wait for that."""

    code = Code.RESOURCE_EXHAUSTED
    default_reason = "QUOTA_EXCEEDED"

    def __init__(self, message: str, retry_seconds: float, **metadata: object) -> None:
        super().__init__(message, **metadata)  # type: ignore[arg-type]
        self.retry_seconds = retry_seconds


class UnauthenticatedError(ServiceError):
    """Nobody knows who calls."""

    code = Code.UNAUTHENTICATED
    default_reason = "KEY_UNKNOWN"


class PermissionDeniedError(ServiceError):
    """The caller may not do this, or not here."""

    code = Code.PERMISSION_DENIED
    default_reason = "ROLE_NEEDED"


class DiskFullError(ServiceError):
    """A write did not fit the disk; nothing of it was stored."""

    code = Code.RESOURCE_EXHAUSTED
    default_reason = "DISK_FULL"


class ResourceError(ServiceError):
    """What is asked for does not fit this machine."""

    code = Code.RESOURCE_EXHAUSTED
    default_reason = "NOT_ENOUGH_MEMORY"


class ExpiredError(ServiceError):
    """The deadline passed before any compute."""

    code = Code.DEADLINE_EXCEEDED
    default_reason = "EXPIRED_IN_QUEUE"


class UnavailableError(ServiceError):
    """Try again, here or elsewhere."""

    code = Code.UNAVAILABLE
    default_reason = "DRAINING"
    retry_seconds = 1.0


class DataLossError(ServiceError):
    """A stored file is not what was written."""

    code = Code.DATA_LOSS
    default_reason = "INDEX_CHECKSUM"


class InternalError(ServiceError):
    """A fault of ours."""


def unreadable(error: UnreadablePictureError, field: str) -> InvalidArgumentError:
    """A picture's refusal as the API says it."""
    return InvalidArgumentError(str(error), error.reason, field)


def _short(text: str, limit: int) -> str:
    """Without its middle, where its UTF-8 has more bytes."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return text
    half = limit // 2 - 4
    return f"{data[:half].decode(errors='ignore')} ... {data[-half:].decode(errors='ignore')}"


def _pack(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
