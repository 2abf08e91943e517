"""Mooncake Store in its two modes that need no special hardware, for the transfer bench.

    python mooncake_store.py BYTES BATCH CLIENTS SECONDS

Needs the package mooncake-transfer-engine-non-cuda. `local`: the store's segment is in the reader's own process and is read by memcpy.
`tcp`: the segment is in another process and is read over loopback TCP, unencrypted. Prints, for each: name, GB/s, p50 and p99 in
microseconds. Values are read into registered memory, whole batches at a time.
"""

import ctypes
import multiprocessing
import os
import pathlib
import socket
import subprocess
import sys
import time


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def open_store(master, segment_bytes, buffer_bytes):
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    host = f"127.0.0.1:{free_port()}"
    code = store.setup(host, "P2PHANDSHAKE", segment_bytes, buffer_bytes, "tcp", "", master)
    if code != 0:
        raise RuntimeError(f"setup failed: {code}")
    return store


def fill(store, size, batch):
    for i in range(batch):
        code = store.put(f"block{i}", bytes([i % 251]) * size)
        if code != 0:
            raise RuntimeError(f"put failed: {code}")


def read(store, size, batch, seconds):
    memory = ctypes.create_string_buffer(size * batch)
    start = ctypes.addressof(memory)
    store.register_buffer(start, size * batch)
    keys = [f"block{i}" for i in range(batch)]
    places = [start + i * size for i in range(batch)]
    times, began = [], time.perf_counter()
    while True:
        t = time.perf_counter()
        got = store.batch_get_into(keys, places, [size] * batch)
        times.append(time.perf_counter() - t)
        if any(n != size for n in got):
            raise RuntimeError(f"get failed: {got}")
        if time.perf_counter() - began > seconds and len(times) > 3:
            break
    for i in range(batch):
        assert memory[(i + 1) * size - 1] == bytes([i % 251])
    return times[1:]


def holder(master, size, batch, ready, done):
    os.environ["MC_STORE_MEMCPY"] = "0"
    store = open_store(master, size * batch + (512 << 20), 64 << 20)
    fill(store, size, batch)
    ready.set()
    done.wait()
    store.close()


def reader(mode, master, size, batch, seconds, start, results):
    os.environ["MC_STORE_MEMCPY"] = "1" if mode == "local" else "0"
    own = size * batch + (512 << 20) if mode == "local" else 0
    store = open_store(master, own, max(64 << 20, 2 * size * batch))
    if mode == "local":
        fill(store, size, batch)
    ready, go = start
    ready.release()
    go.wait()
    results.put(read(store, size, batch, seconds))
    store.close()


def run(mode, size, batch, clients, seconds):
    port, metrics = free_port(), free_port()
    master = f"127.0.0.1:{port}"
    program = pathlib.Path(sys.executable).parent / "mooncake_master"
    command = [program, f"--rpc_port={port}", f"--metrics_port={metrics}"]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    context = multiprocessing.get_context("spawn")
    ready, done, results = context.Event(), context.Event(), context.Queue()
    other = None
    try:
        time.sleep(1)
        if mode == "tcp":
            other = context.Process(target=holder, args=(master, size, batch, ready, done))
            other.start()
            if not ready.wait(30):
                raise RuntimeError("the segment's process did not come up")
        start = (context.Semaphore(0), context.Event())
        arguments = (mode, master, size, batch, seconds, start, results)
        readers = [context.Process(target=reader, args=arguments) for _ in range(clients)]
        for process in readers:
            process.start()
        for _ in readers:
            if not start[0].acquire(timeout=60):
                raise RuntimeError("a reader did not start")
        start[1].set()
        times = [results.get(timeout=60 + seconds) for _ in readers]
        for process in readers:
            process.join(30)
    finally:
        done.set()
        if other:
            other.join(10)
        server.terminate()
        server.wait(10)
    rate = sum(size * batch * len(one) / sum(one) for one in times) / 1e9
    every = sorted(t for one in times for t in one)
    quantile = lambda q: every[round((len(every) - 1) * q)] * 1e6
    print(f"RESULT mooncake {mode} get\t{rate}\t{quantile(0.5)}\t{quantile(0.99)}", flush=True)


if __name__ == "__main__":
    size, batch, clients = (int(text) for text in sys.argv[1:4])
    for mode in ["local", "tcp"]:
        # With several readers each would have a segment of its own, and the keys would be the last one's.
        if mode == "local" and clients > 1:
            continue
        try:
            run(mode, size, batch, clients, float(sys.argv[4]))
        except Exception as error:
            print(f"mooncake {mode}: {error}", file=sys.stderr)
