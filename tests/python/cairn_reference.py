"""Block identity, written independently of the Rust code: for tests, and for whoever ports it to another language.

`python cairn_reference.py` writes the golden vectors to standard output.
"""

import json
import struct

import blake3
import xxhash

SPACE_ID_CONTEXT = "cairn 2026-11 key space id v1"
BLOCK_HASH_CONTEXT = "cairn 2026-11 block hash v1"
DTYPES = {"f32": 1, "f16": 2, "bf16": 3, "fp8_e4m3": 4}
DTYPE_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "fp8_e4m3": 1}
PROTOCOLS = {"cairn_blake3_v1": 1, "vllm_sha256": 2}
EXTRA_KEYS = {"lora": 1, "media": 2, "salt": 3}


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def space_id(space: dict) -> bytes:
    tenant = space["tenant"].encode()
    layout, shard = space["layout"], space["shard"]
    encoded = b"".join([
        u32(len(tenant)), tenant, bytes.fromhex(space["tenant_salt"]), bytes.fromhex(space["model_fingerprint"]),
        bytes([DTYPES[space["dtype"]]]),
        u32(layout["layers"], layout["kv_heads"], layout["head_dim"], layout["block_tokens"]), bytes([1]),
        u32(shard["first_layer"], shard["total_layers"], shard["first_kv_head"], shard["total_kv_heads"]),
        bytes([PROTOCOLS[space["hash_protocol"]]]),
    ])
    return blake3.blake3(encoded, derive_key_context=SPACE_ID_CONTEXT).digest()


def block_bytes(space: dict) -> int:
    layout = space["layout"]
    elements = 2 * layout["layers"] * layout["kv_heads"] * layout["head_dim"] * layout["block_tokens"]
    return elements * DTYPE_BYTES[space["dtype"]]


def block_hash(parent: bytes, tokens: list, extra_keys: list) -> bytes:
    data = parent + u32(len(tokens), *tokens) + u32(len(extra_keys))
    for kind, value in extra_keys:
        raw = value.encode() if kind == "lora" else bytes.fromhex(value)
        data += bytes([EXTRA_KEYS[kind]]) + u32(len(raw)) + raw
    return blake3.blake3(data, derive_key_context=BLOCK_HASH_CONTEXT).digest()


def chain(space: dict, tokens: list, extra_keys: dict) -> list:
    """Hashes of the full blocks; `extra_keys` maps a block's position (as text) to its keys."""
    size = space["layout"]["block_tokens"]
    parent, hashes = space_id(space), []
    for block in range(len(tokens) // size):
        parent = block_hash(parent, tokens[block * size:(block + 1) * size], extra_keys.get(str(block), []))
        hashes.append(parent)
    return hashes


def checksum(space: bytes, block: bytes, payload: bytes) -> bytes:
    """XXH3-128 seeded with the identity, little endian (the digest of the xxhash package is big endian)."""
    seed = int.from_bytes(space[:8], "little") ^ int.from_bytes(block[:8], "little")
    return xxhash.xxh3_128_digest(payload, seed=seed)[::-1]


def example_payload(length: int) -> bytes:
    return bytes((31 * i + 7) % 251 for i in range(length))


def make() -> dict:
    def space(tenant, dtype, layers, kv_heads, head_dim, block_tokens, protocol="cairn_blake3_v1", salt="00" * 32):
        return {
            "tenant": tenant, "tenant_salt": salt, "model_fingerprint": "ab" * 32, "dtype": dtype,
            "layout": {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "block_tokens": block_tokens},
            "shard": {"first_layer": 0, "total_layers": layers, "first_kv_head": 0, "total_kv_heads": kv_heads},
            "hash_protocol": protocol,
        }

    cases = [
        (space("default", "bf16", 30, 3, 64, 16), list(range(40)), {}),
        (space("müller & co", "f16", 2, 8, 128, 32, salt="5c" * 32), [7 * i % 1000 for i in range(100)], {}),
        (space("default", "f32", 1, 1, 16, 16), [2**32 - 1, 0] * 24,
         {"0": [["lora", "adapter-7"]], "2": [["media", "00ff10"], ["salt", ""]]}),
        (space("t", "fp8_e4m3", 4, 2, 64, 16, protocol="vllm_sha256"), [5] * 15, {}),
    ]
    out = []
    for each, tokens, extra in cases:
        hashes = chain(each, tokens, extra)
        case = {"space": each, "space_id": space_id(each).hex(), "block_bytes": block_bytes(each), "tokens": tokens,
                "extra_keys": extra, "hashes": [h.hex() for h in hashes], "checksums": []}
        for length in (1, 200, 5000):
            for block in hashes[:1]:
                digest = checksum(space_id(each), block, example_payload(length))
                case["checksums"].append({"payload_bytes": length, "checksum": digest.hex()})
        out.append(case)
    return {"format": 1, "cases": out}


if __name__ == "__main__":
    print(json.dumps(make(), indent=1, ensure_ascii=False))
