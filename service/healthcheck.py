"""`likewise healthcheck`: exit code 0 when a server is ready, for containers."""

from __future__ import annotations

import contextlib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from export.bundle import RefusalError
from service.config import ClientTls


class HealthCheck(BaseModel):
    """Ask a server whether it is ready: exit code 0 when it is, 1 when not."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    server: str = "localhost:50051"
    """Address of the server."""
    timeout: float = Field(5.0, gt=0)
    """Seconds to wait."""
    service: str = ""
    """What to ask for: readiness where empty, one of the services, or `liveness` (whether the process answers at all)."""
    tls: ClientTls = ClientTls()
    """How the server is trusted, and what it is shown."""

    def cli_cmd(self) -> int:
        """Run the command."""
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from service.client import _channel

        request = health_pb2.HealthCheckRequest(service=self.service)
        with contextlib.closing(_channel(grpc, self.server, 1, self.tls)) as channel:
            try:
                status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=self.timeout).status
            except grpc.RpcError as error:
                e: Any = error  # a call object, which the type does not say
                if e.code() is grpc.StatusCode.NOT_FOUND:
                    raise RefusalError(f"{self.server} has no service {self.service!r}: leave it out") from None
                said = e.details() or e.code().name
                raise RefusalError(
                    f"no server answers at {self.server} ({said}): start one with `likewise serve`, or check --tls"
                ) from None
        ready = status == health_pb2.HealthCheckResponse.SERVING
        print("ready" if ready else "not ready")
        return 0 if ready else 1
