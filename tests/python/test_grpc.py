"""A client in another language: stubs from `proto/` with stock grpcio-tools, blocks published by a Rust worker."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.request

import cairn_reference as reference
import grpc
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).parents[2]
API_VERSION = 1
PROMPT = [(11 * i + i * i) % 256 for i in range(100)]


def binary() -> pathlib.Path:
    named = os.environ.get("CAIRN_BIN")
    candidates = [pathlib.Path(named)] if named else [ROOT / "target" / p / "cairn" for p in ("release", "debug")]
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError("build the command first: cargo build --release -p cairn")


def stubs(folder: str):
    proto = ROOT / "proto"
    files = [str(path) for path in (proto / "cairn" / "v1").glob("*.proto")]
    arguments = ["protoc", f"-I{proto}", f"--python_out={folder}", f"--grpc_python_out={folder}", *files]
    assert protoc.main(arguments) == 0
    sys.path.insert(0, folder)
    from cairn.v1 import admin_pb2_grpc, admin_pb2, cache_pb2, cache_pb2_grpc
    return cache_pb2, cache_pb2_grpc, admin_pb2, admin_pb2_grpc


class Process:
    """Ends when its standard input closes, and so with this test."""

    def __init__(self, *arguments: str):
        command = [str(binary()), "--log", "warn", *arguments, "--supervised"]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = json.loads(self.child.stdout.readline())["address"]

    def stop(self):
        self.child.stdin.close()
        self.child.wait(timeout=20)
        self.child.stdout.close()


class GrpcClient(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.pb, cls.rpc, cls.admin_pb, cls.admin_rpc = stubs(cls.folder.name)
        loopback = "127.0.0.1:0"
        cls.server = Process("serve", "--listen", loopback, "--http-listen", loopback, "--capacity-mib", "256")
        cls.worker = Process("worker", "--listen", loopback, "--model", "synthetic:1", "--cache",
                             f"http://{cls.server.address}")
        cls.channel = grpc.insecure_channel(cls.server.address)
        cls.cache = cls.rpc.CacheStub(cls.channel)
        cls.admin = cls.admin_rpc.AdminStub(cls.channel)

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        cls.worker.stop()
        cls.server.stop()
        cls.folder.cleanup()

    def publish_with_the_worker(self) -> None:
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://{self.worker.address}/v1/completions", body,
                                         {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()
        deadline = time.monotonic() + 20
        while self.admin.Stats(self.admin_pb.StatsRequest()).committed_blocks < len(PROMPT) // 16:
            self.assertLess(time.monotonic(), deadline, "the worker did not publish")
            time.sleep(0.05)

    def space_of_the_worker(self) -> dict:
        """The key space as the server tells it; the tenant of this test has no secret salt."""
        stats = self.admin.Stats(self.admin_pb.StatsRequest())
        message = stats.spaces[0].space
        layout, shard = message.layout, message.shard
        space = {
            "tenant": message.tenant, "tenant_salt": "00" * 32, "model_fingerprint": message.model_fingerprint.hex(),
            "dtype": {v: k for k, v in reference.DTYPES.items()}[message.dtype],
            "layout": {"layers": layout.layers, "kv_heads": layout.kv_heads, "head_dim": layout.head_dim,
                       "block_tokens": layout.block_tokens},
            "shard": {"first_layer": shard.first_layer, "total_layers": shard.total_layers,
                      "first_kv_head": shard.first_kv_head, "total_kv_heads": shard.total_kv_heads},
            "hash_protocol": {v: k for k, v in reference.PROTOCOLS.items()}[message.hash_protocol],
        }
        self.assertEqual(reference.space_id(space), stats.spaces[0].space_id)
        self.assertEqual(reference.block_bytes(space), stats.spaces[0].block_bytes)
        return space

    def test_blocks_are_found_fetched_and_verified(self):
        self.publish_with_the_worker()
        space = self.space_of_the_worker()
        hashes = reference.chain(space, PROMPT, {})
        space_id = reference.space_id(space)
        events = self.cache.Session(self.pb.SessionRequest(client_name="python", api_version=API_VERSION))
        session = next(events).opened.session_id
        question = self.pb.LookupRequest(session_id=session, space_id=space_id, block_hashes=b"".join(hashes))
        with self.assertRaises(grpc.RpcError) as undeclared:
            self.cache.Lookup(question)
        self.assertEqual(undeclared.exception.code(), grpc.StatusCode.NOT_FOUND)
        message = self.admin.Stats(self.admin_pb.StatsRequest()).spaces[0].space
        message.tenant_salt = bytes(32)
        opened = self.cache.OpenSpace(self.pb.OpenSpaceRequest(session_id=session, space=message))
        self.assertEqual(opened.space_id, space_id)
        lookup = self.cache.Lookup(question)
        self.assertEqual([(run.count, run.kind) for run in lookup.outcomes], [(6, 1)])
        blocks = [bytearray() for _ in hashes]
        request = self.pb.FetchRequest(session_id=session, lease_id=lookup.lease_id, first=0, count=6)
        for chunk in self.cache.Fetch(request):
            for piece in chunk.pieces:
                self.assertEqual(piece.offset, len(blocks[piece.block]))
                blocks[piece.block] += piece.data
        for i, (block, name) in enumerate(zip(blocks, hashes, strict=True)):
            self.assertEqual(len(block), reference.block_bytes(space))
            expected = lookup.checksums[16 * i:16 * (i + 1)]
            self.assertEqual(reference.checksum(space_id, name, bytes(block)), expected)
            self.assertGreater(len(set(block)), 50, "attention state, not padding")
        explained = self.cache.Explain(self.pb.ExplainRequest(space_id=space_id, block_hashes=hashes[0] + bytes(32)))
        self.assertEqual([block.WhichOneof("state") for block in explained.blocks], ["resident", "absent"])
        self.cache.ReleaseLease(self.pb.ReleaseLeaseRequest(session_id=session, lease_ids=[lookup.lease_id]))
        events.cancel()

    def test_a_python_publisher_is_read_back(self):
        self.publish_with_the_worker()
        space = {**self.space_of_the_worker(), "tenant": "python"}
        space_id = reference.space_id(space)
        events = self.cache.Session(self.pb.SessionRequest(client_name="python", api_version=API_VERSION))
        session = next(events).opened.session_id
        message = self.admin.Stats(self.admin_pb.StatsRequest()).spaces[0].space
        message.tenant, message.tenant_salt = "python", bytes(32)
        opened = self.cache.OpenSpace(self.pb.OpenSpaceRequest(session_id=session, space=message))
        self.assertEqual(opened.space_id, space_id)
        name = reference.chain(space, list(range(16)), {})[0]
        payload = reference.example_payload(opened.block_bytes)
        reserved = self.cache.Reserve(self.pb.ReserveRequest(session_id=session, space_id=space_id, block_hashes=name))
        self.assertEqual(reserved.grants[0].grant, 1)

        def chunks(checksum: bytes, reservation: int):
            yield self.pb.PublishChunk(header=self.pb.PublishHeader(session_id=session, reservation_id=reservation))
            for offset in range(0, len(payload), 1 << 18):
                piece = self.pb.BlockPiece(block=0, offset=offset, data=payload[offset:offset + (1 << 18)])
                yield self.pb.PublishChunk(pieces=self.pb.PublishPieces(pieces=[piece]))
            seal = self.pb.BlockSeal(block=0, checksum=checksum)
            yield self.pb.PublishChunk(pieces=self.pb.PublishPieces(seals=[seal]))

        good = reference.checksum(space_id, name, payload)
        wrong = self.cache.Publish(chunks(bytes(16), reserved.reservation_id))
        self.assertEqual(wrong.commits[0].commit, self.pb.COMMIT_CHECKSUM_MISMATCH)
        again = self.cache.Reserve(self.pb.ReserveRequest(session_id=session, space_id=space_id, block_hashes=name))
        stored = self.cache.Publish(chunks(good, again.reservation_id))
        self.assertEqual(stored.commits[0].commit, self.pb.COMMIT_COMMITTED)
        lookup = self.cache.Lookup(self.pb.LookupRequest(session_id=session, space_id=space_id, block_hashes=name))
        request = self.pb.FetchRequest(session_id=session, lease_id=lookup.lease_id, first=0, count=1)
        fetched = b"".join(piece.data for chunk in self.cache.Fetch(request) for piece in chunk.pieces)
        self.assertEqual(fetched, payload)
        events.cancel()

    def test_mistakes_get_the_documented_codes(self):
        with self.assertRaises(grpc.RpcError) as unknown:
            self.cache.Lookup(self.pb.LookupRequest(session_id=12345, space_id=bytes(32)))
        self.assertEqual(unknown.exception.code(), grpc.StatusCode.NOT_FOUND)
        events = self.cache.Session(self.pb.SessionRequest(client_name="python", api_version=API_VERSION))
        session = next(events).opened.session_id
        with self.assertRaises(grpc.RpcError) as ragged:
            self.cache.Lookup(self.pb.LookupRequest(session_id=session, space_id=bytes(31)))
        self.assertEqual(ragged.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        events.cancel()


if __name__ == "__main__":
    unittest.main()
