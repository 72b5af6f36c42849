"""likewise.v1.ReleaseService: message → call → message."""

from __future__ import annotations

from service.acceptance import Acceptance, Asked
from service.errors import InvalidArgumentError, ServiceError
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from service.releases import Releases, Standby, State, left_out
from service.servicer import MAX_ITEMS, Context, Engine, write_seconds

_STATES = {state: pb.ReleaseState.Value(f"RELEASE_STATE_{state.name}") for state in State}


class ReleaseService(pb_grpc.ReleaseServiceServicer):
    """likewise.v1.ReleaseService."""

    def __init__(self, engine: Engine, releases: Releases) -> None:
        self._engine, self._releases = engine, releases

    async def PrepareRelease(self, request: pb.PrepareReleaseRequest, context: Context) -> pb.PrepareReleaseResponse:  # noqa: N802  # fmt: skip
        """See the proto."""
        asked = [_asked(query, i) for i, query in enumerate(request.acceptance)]
        if len(asked) > MAX_ITEMS:
            raise InvalidArgumentError(
                f"there are {len(asked)} acceptance queries, {MAX_ITEMS} are allowed", "BAD_COUNT", "acceptance"
            )
        if not 0 <= request.min_overlap <= 1:
            raise InvalidArgumentError("min_overlap is a share, from 0 to 1", "BAD_MIN_OVERLAP", "min_overlap")
        await self._releases.prepare(request.collection, request.release, asked, request.min_overlap)
        return pb.PrepareReleaseResponse(release=await self._release(request.collection))

    async def GetRelease(self, request: pb.GetReleaseRequest, context: Context) -> pb.GetReleaseResponse:  # noqa: N802
        """See the proto."""
        return pb.GetReleaseResponse(release=await self._release(request.collection))

    async def ListReleases(self, request: pb.ListReleasesRequest, context: Context) -> pb.ListReleasesResponse:  # noqa: N802  # fmt: skip
        """See the proto."""
        return pb.ListReleasesResponse(releases=[await self._release(name) for name in self._releases.names()])

    async def SwitchRelease(self, request: pb.SwitchReleaseRequest, context: Context) -> pb.SwitchReleaseResponse:  # noqa: N802  # fmt: skip
        """See the proto."""
        held = await self._releases.switch(request.collection, request.release, request.leave_out)
        response = pb.SwitchReleaseResponse(release=await self._release(request.collection))
        write_seconds(response.writes_held, held)
        return response

    async def RollBackRelease(  # noqa: N802
        self, request: pb.RollBackReleaseRequest, context: Context
    ) -> pb.RollBackReleaseResponse:
        """See the proto."""
        held = await self._releases.roll_back(request.collection, request.leave_out)
        response = pb.RollBackReleaseResponse(release=await self._release(request.collection))
        write_seconds(response.writes_held, held)
        return response

    async def FinishRelease(self, request: pb.FinishReleaseRequest, context: Context) -> pb.FinishReleaseResponse:  # noqa: N802  # fmt: skip
        """See the proto."""
        await self._releases.finish(request.collection)
        return pb.FinishReleaseResponse(release=await self._release(request.collection))

    async def _release(self, name: str) -> pb.Release:
        live, served = self._releases.live(name)
        release = pb.Release(collection=name, live=live, live_space_id=served.collection.space_id)
        standby = self._releases.standby(name)
        if standby is not None:
            release.standby.CopyFrom(_standby(standby, await self._engine.read(self._releases.lag, name, standby)))
        return release


def _standby(standby: Standby, lag: int) -> pb.Standby:
    message = pb.Standby(release=standby.release, state=_STATES[standby.state], lag=lag, was_live=standby.was_live)
    if standby.served is not None:
        message.space_id, message.item_count = standby.served.collection.space_id, len(standby.served.collection)
    counts, examples = left_out(standby)
    message.left_out_count = counts.total()
    for reason, count in counts.most_common():
        message.left_out.add(reason=reason, count=count, keys=examples[reason])
    if standby.acceptance is not None:
        message.acceptance.CopyFrom(_acceptance(standby.acceptance))
    if isinstance(standby.error, ServiceError):
        message.error.CopyFrom(standby.error.status())
    return message


def _acceptance(found: Acceptance) -> pb.Acceptance:
    return pb.Acceptance(
        passed=found.passed, self_queries=found.self_queries, self_found=found.self_found, pictures=found.pictures,
        min_picture_score=found.min_picture_score, overlap_at_10=found.overlap_at_10, problems=found.problems,
        results=[pb.AcceptanceResult(rank=rank) for rank in found.ranks],
    )  # fmt: skip


def _asked(query: pb.AcceptanceQuery, i: int) -> Asked:
    """Raises `InvalidArgumentError`."""
    kind = query.query.WhichOneof("kind")
    path = f"acceptance[{i}]"
    if kind not in ("image", "key"):
        raise InvalidArgumentError(
            "the acceptance query is neither a picture nor the key of an item: vectors of one encoder say nothing of "
            "another", "BAD_ACCEPTANCE", f"{path}.query",
        )  # fmt: skip
    top_k = query.top_k if query.HasField("top_k") else 10
    if not query.expected_key or not 1 <= top_k <= 1000:
        raise InvalidArgumentError(
            "an acceptance query names the key that it expects, among 1 to 1000 neighbours", "BAD_ACCEPTANCE", path
        )
    picture = query.query.image.content if kind == "image" else None
    return Asked(query.expected_key, top_k, picture, query.query.key)
