"""A server that is killed (SIGKILL) while clients write over gRPC: what it acknowledged is there when it comes back.

    python -m benchmarks.kill_server --out FOLDER [--kills 100]
    python -m benchmarks.kill_server --out FOLDER --quick

Three clients write all the time, each its own keys: upserts of vectors and pictures, deletions, and a stream of items. At a
random moment the server is killed, and started again on the same folder. Then each key must have what was acknowledged last,
or what was on its way.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np

from benchmarks.record import finish
from benchmarks.serving import ServerProcess, made_bundle
from service.pb import likewise_pb2 as pb
from service.pb import likewise_pb2_grpc as pb_grpc
from tests.conftest import encode, noise

NAME = "killed"
KEYS = 200
PICTURE = encode(noise(40, 30))
Model = dict[str, int | None]
"""By key the seed of its vector; None where it was deleted."""


class KilledServer:
    """A server, its writers, and the model beside them."""

    def __init__(self, bundle: Path, out: Path, seed: int) -> None:
        self._bundle, self._out = bundle, out
        self._random = random.Random(seed)
        self._model: Model = {}
        self._pending: dict[str, list[int | None]] = {}
        """Writes that were sent and not answered, in their order."""
        self._lock = threading.Lock()
        self._number = 0
        self.counts: Counter[str] = Counter()

    def run(self, kills: int) -> list[str]:
        """What was found to be wrong."""
        server = self._started()
        with grpc.insecure_channel(server.address) as channel:
            pb_grpc.CollectionServiceStub(channel).CreateCollection(pb.CreateCollectionRequest(name=NAME))
            encoder = pb_grpc.EncoderServiceStub(channel).GetEncoder(pb.GetEncoderRequest()).encoder
        self._dim = encoder.dimensions
        wrong: list[str] = []
        for kill in range(kills):
            writers = [
                threading.Thread(target=self._written, args=(write, server.address))
                for write in (self._unary, self._deleting, self._streaming)
            ]
            for writer in writers:
                writer.start()
            threading.Event().wait(self._random.uniform(0.2, 1.5))
            server.kill()
            for writer in writers:
                writer.join(30)
            assert not any(writer.is_alive() for writer in writers)
            server = self._started()
            found = self._differences(server.address)
            wrong += [f"kill {kill}: {each}" for each in found]
            self.counts["kills"] += 1
            print(f"kill {kill + 1} of {kills}: {len(self._model)} keys, {len(found)} wrong", flush=True)
        assert server.stop() == 0
        return wrong

    def _started(self) -> ServerProcess:
        return ServerProcess(self._bundle, self._out / "collections", self._out / "server.log", "--threads", "1")

    # --- writers ------------------------------------------------------------------------------------------------------

    def _written(self, write: Callable[[pb_grpc.CollectionServiceStub], None], address: str) -> None:
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                while True:
                    write(pb_grpc.CollectionServiceStub(channel))
            except grpc.RpcError as e:  # the server is gone
                assert isinstance(e, grpc.Call) and e.code() is grpc.StatusCode.UNAVAILABLE, e

    def _lot(self, writer: str, most: int) -> list[tuple[str, int]]:
        """Keys of a writer with new seeds, which are noted as sent."""
        with self._lock:
            keys = self._random.sample(range(KEYS), self._random.randrange(1, most))
            lot = []
            for key in keys:
                self._number += 1
                lot.append((f"{writer}/{key}", self._number))
                self._pending.setdefault(lot[-1][0], []).append(self._number)
            return lot

    def _done(self, key: str, seed: int | None) -> None:
        """Acknowledged: writes of the key that were sent before are over, too."""
        with self._lock:
            self._model[key] = seed
            pending = self._pending[key]
            del pending[: pending.index(seed) + 1]
            self.counts["acknowledged"] += 1

    def _item(self, key: str, seed: int) -> pb.NewItem:
        item = pb.NewItem(key=key)
        if seed % 17 == 0:
            item.image.content = PICTURE
        else:
            item.vector.values.extend(vector(seed, self._dim).tolist())
        item.payload.update({"seed": seed})
        return item

    def _unary(self, stub: pb_grpc.CollectionServiceStub) -> None:
        lot = self._lot("unary", 12)
        items = [self._item(*each) for each in lot]
        reply = stub.UpsertItems(pb.UpsertItemsRequest(collection=NAME, items=items))
        for (key, seed), result in zip(lot, reply.results, strict=True):
            assert not result.HasField("error"), result
            self._done(key, seed)

    def _deleting(self, stub: pb_grpc.CollectionServiceStub) -> None:
        lot = self._lot("deleted", 6)
        items = [self._item(*each) for each in lot]
        stub.UpsertItems(pb.UpsertItemsRequest(collection=NAME, items=items))
        for key, seed in lot:
            self._done(key, seed)
        keys = [key for key, _ in lot[::2]]
        with self._lock:
            for key in keys:
                self._pending[key].append(None)
        stub.DeleteItems(pb.DeleteItemsRequest(collection=NAME, keys=keys))
        for key in keys:
            self._done(key, None)

    def _streaming(self, stub: pb_grpc.CollectionServiceStub) -> None:
        sent: list[tuple[str, int]] = []

        def requests() -> Iterator[pb.StreamUpsertRequest]:
            while True:
                lot = self._lot("stream", 8)
                sent.extend(lot)
                yield pb.StreamUpsertRequest(collection=NAME, items=[self._item(*each) for each in lot])

        at = 0
        for answer in stub.StreamUpsert(requests()):
            for result in answer.results:
                assert not result.HasField("error"), result
                self._done(*sent[at])
                at += 1

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def _differences(self, address: str) -> list[str]:
        """From here on the model is what the server holds."""
        found: dict[str, pb.Item] = {}
        request = pb.ListItemsRequest(collection=NAME, page_size=1000, with_vectors=True)
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.CollectionServiceStub(channel)
            while True:
                page = stub.ListItems(request)
                found |= {item.key: item for item in page.items}
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
            count = stub.GetCollection(pb.GetCollectionRequest(name=NAME)).collection.item_count
        wrong = [] if count == len(found) else [f"{count} items are said to be there, {len(found)} are listed"]
        for key in sorted(self._model.keys() | self._pending.keys() | found.keys()):
            allowed = {self._model.get(key), *self._pending.get(key, ())}
            item = found.get(key)
            seed = None if item is None else int(item.payload["seed"])
            if seed not in allowed:
                wrong.append(f"{key} has {seed}, not one of {allowed}")
            elif item is not None and seed is not None and seed % 17 and _differs(item, vector(seed, self._dim)):
                wrong.append(f"{key} has another vector than {seed}")
            self._model[key] = seed
        self._pending.clear()
        return wrong


def _differs(item: pb.Item, expected: np.ndarray) -> bool:
    return not np.allclose(item.vector.values, expected, atol=1e-6)


def vector(seed: int, dim: int) -> np.ndarray:
    """[dim], of length 1."""
    row = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return row / np.linalg.norm(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder; the collections in it are removed")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    kills = 4 if args.quick else args.kills
    bundle = made_bundle(args.out)
    shutil.rmtree(args.out / "collections", ignore_errors=True)
    killed = KilledServer(bundle, args.out, args.seed)
    wrong = killed.run(kills)
    figures = {**killed.counts, "wrong": wrong[:20]}
    print(json.dumps(figures, indent=1))
    finish("kill_server", figures, [("kills_that_lost_nothing", 1 - len(wrong) / kills, 1.0)], args.seed, args.quick)


if __name__ == "__main__":
    main()
