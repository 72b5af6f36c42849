"""`likewise healthcheck`: exit code 0 when a server is ready, for containers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from export.bundle import RefusalError


class HealthCheck(BaseModel):
    """Ask a server whether it is ready: exit code 0 when it is, 1 when not."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    server: str = "localhost:50051"
    """Address of the server."""
    timeout: float = Field(5.0, gt=0)
    """Seconds to wait."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from service.client import CallError, Client

        try:
            with Client(self.server, self.timeout) as client:
                ready = client.ready()
        except CallError as e:
            raise RefusalError(str(e)) from e
        print("ready" if ready else "not ready")
        return 0 if ready else 1
