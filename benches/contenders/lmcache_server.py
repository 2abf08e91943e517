"""LMCache's own cache server (`lmcache_server`), for the transfer bench.

    python lmcache_server.py BYTES BATCH CLIENTS SECONDS

Needs the package lmcache. The server runs as a process of its own on loopback, unencrypted. A client sends the package's own messages over
one TCP connection and receives into memory that it has already: one GET for each block, since the protocol knows no batches. That is
less work than LMCache's connector does (which allocates), so it flatters LMCache if anything. Prints name, GB/s, p50 and p99 in
microseconds.
"""

import multiprocessing
import pathlib
import socket
import subprocess
import sys
import time


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Connection:
    def __init__(self, port):
        from lmcache.utils import CacheEngineKey
        from lmcache.v1 import protocol
        from lmcache.v1.memory_management import MemoryFormat
        import torch

        self.protocol, self.torch, self.key_type = protocol, torch, CacheEngineKey
        self.format = MemoryFormat.BINARY
        self.answer_bytes = protocol.ServerMetaMessage.packlength()
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def message(self, command, i, size):
        key = self.key_type("bench", 1, 0, 1000 + i, self.torch.bfloat16)
        shape = self.torch.Size([size, 0, 0, 0])
        return self.protocol.ClientMetaMessage(command, key, size, self.format, self.torch.uint8, shape).serialize()

    def put(self, i, value):
        self.socket.sendall(self.message(self.protocol.ClientCommand.PUT, i, len(value)))
        self.socket.sendall(value)

    def exactly(self, view):
        got = 0
        while got < len(view):
            count = self.socket.recv_into(view[got:])
            if count == 0:
                raise RuntimeError("the server closed the connection")
            got += count

    def get(self, request, view):
        self.socket.sendall(request)
        head = bytearray(self.answer_bytes)
        self.exactly(memoryview(head))
        answer = self.protocol.ServerMetaMessage.deserialize(bytes(head))
        if answer.length != len(view):
            raise RuntimeError(f"a value of {answer.length} bytes, not {len(view)}")
        self.exactly(view)


def reader(port, size, batch, seconds, ready, start, results):
    connection = Connection(port)
    memory = bytearray(size * batch)
    views = [memoryview(memory)[i * size : (i + 1) * size] for i in range(batch)]
    requests = [connection.message(connection.protocol.ClientCommand.GET, i, 0) for i in range(batch)]
    times = []
    ready.release()
    start.wait()
    began = time.perf_counter()
    while True:
        t = time.perf_counter()
        for request, view in zip(requests, views):
            connection.get(request, view)
        times.append(time.perf_counter() - t)
        if time.perf_counter() - began > seconds and len(times) > 3:
            break
    for i, view in enumerate(views):
        assert view[0] == view[size - 1] == i % 251
    results.put(times[1:])


def main(size, batch, clients, seconds):
    port = free_port()
    program = pathlib.Path(sys.executable).parent / "lmcache_server"
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([program, "127.0.0.1", str(port), "cpu"], stdout=quiet, stderr=quiet)
    context = multiprocessing.get_context("spawn")
    ready, start, results = context.Semaphore(0), context.Event(), context.Queue()
    try:
        for attempt in range(300):
            try:
                writer = Connection(port)
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        else:
            raise RuntimeError("the server did not come up")
        for i in range(batch):
            writer.put(i, bytes([i % 251]) * size)
        arguments = (port, size, batch, seconds, ready, start, results)
        readers = [context.Process(target=reader, args=arguments) for _ in range(clients)]
        for process in readers:
            process.start()
        for _ in readers:
            if not ready.acquire(timeout=60):
                raise RuntimeError("a reader did not start")
        start.set()
        times = [results.get(timeout=60 + seconds) for _ in readers]
        for process in readers:
            process.join(30)
    finally:
        server.terminate()
        server.wait(10)
    rate = sum(size * batch * len(one) / sum(one) for one in times) / 1e9
    every = sorted(t for one in times for t in one)
    quantile = lambda q: every[round((len(every) - 1) * q)] * 1e6
    print(f"RESULT lmcache get\t{rate}\t{quantile(0.5)}\t{quantile(0.99)}", flush=True)


if __name__ == "__main__":
    size, batch, clients = (int(text) for text in sys.argv[1:4])
    main(size, batch, clients, float(sys.argv[4]))
