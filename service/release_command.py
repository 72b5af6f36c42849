"""`likewise release`: exchange the encoder of a collection that is served."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import CliPositionalArg

from export.bundle import RefusalError
from service.config import ClientTls

if TYPE_CHECKING:
    from service.client import Client, ReleaseInfo


class _OfCollection(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    collection: CliPositionalArg[str]
    """Name of the collection."""
    server: str = "localhost:50051"
    """Address of the server: its admin port, where it has one."""
    key: str | None = None
    """API key, NAME.SECRET, where the server asks for one."""
    timeout: float = Field(300.0, gt=0)
    """Seconds that a call may take."""
    tls: ClientTls = ClientTls()
    """How the server is trusted, and what it is shown."""

    def cli_cmd(self) -> int:
        """Run the command."""
        from service.client import CallError, Client

        try:
            with Client(self.server, self.timeout, key=self.key, tls=self.tls) as client:
                return _say(self._done(client))
        except CallError as e:
            raise RefusalError(str(e)) from e

    def _done(self, client: Client) -> ReleaseInfo:
        raise NotImplementedError


class ReleaseStatus(_OfCollection):
    """Say what a collection is served from, and what stands beside it."""

    def _done(self, client: Client) -> ReleaseInfo:
        return client.release(self.collection)


class ReleasePrepare(_OfCollection):
    """Load a release, RELEASES/NAME of the server, beside a collection; wait until it has caught up."""

    release: CliPositionalArg[str]
    """Name of the release."""
    min_overlap: float = Field(0.0, ge=0, le=1)
    """The least share of the ten nearest neighbours that both have to have in common."""
    wait: bool = True
    """Wait until it is ready; the server goes on without, too."""

    def _done(self, client: Client) -> ReleaseInfo:
        found = client.prepare_release(self.collection, self.release, min_overlap=self.min_overlap)
        said = ""
        while self.wait and found.standby is not None and found.standby.state in ("loading", "catching_up"):
            line = f"{found.standby.state.replace('_', ' ')}, {found.standby.lag:,} writes behind"
            if line != said:
                print(line, file=sys.stderr)
            said = line
            time.sleep(0.5)
            found = client.release(self.collection)
        return found


class ReleaseSwitch(_OfCollection):
    """Serve a prepared release from now on."""

    release: CliPositionalArg[str]
    """Name of the release."""
    leave_out: bool = False
    """Although it cannot hold some items, which are not found any more."""

    def _done(self, client: Client) -> ReleaseInfo:
        return client.switch_release(self.collection, self.release, leave_out=self.leave_out)


class ReleaseRollback(_OfCollection):
    """Serve what was served before the last switch, with what was written since."""

    leave_out: bool = False
    """Although some of that cannot be embedded by the encoder of before; it is not found any more."""

    def _done(self, client: Client) -> ReleaseInfo:
        return client.roll_back_release(self.collection, leave_out=self.leave_out)


class ReleaseFinish(_OfCollection):
    """Unload what stands beside a collection; its files stay."""

    def _done(self, client: Client) -> ReleaseInfo:
        return client.finish_release(self.collection)


def _say(found: ReleaseInfo) -> int:
    """Print it; the exit code: 1 where what stands beside it failed or was not accepted."""
    print(f"{found.collection} is served from {_name(found.live)} ({found.live_space_id})")
    if found.writes_held:
        print(f"  writes were held back for {found.writes_held:.3f} s")
    standby = found.standby
    if standby is None:
        return 0
    print(
        f"  beside it: {_name(standby.release)}, {standby.state.replace('_', ' ')}, {standby.item_count:,} items",
        end="",
    )
    print(f" of {standby.space_id}, {standby.lag:,} writes behind" if standby.space_id else "")
    for reason, count in standby.left_out.items():
        print(f"  {count:,} items left out: {reason}")
    if standby.overlap_at_10 is not None:
        print(f"  {standby.overlap_at_10:.0%} of the ten nearest neighbours are the same")
    for problem in standby.problems:
        print(f"  not accepted: {problem}")
    if standby.error is not None:
        print(f"  failed: {standby.error}")
    return int(standby.error is not None or standby.accepted is False)


def _name(release: str) -> str:
    return f"the release {release!r}" if release else "the server's own bundle"
