"""The golden vectors, recomputed."""

import json
import pathlib
import unittest

import cairn_reference as reference

VECTORS = pathlib.Path(__file__).parents[2] / "proto" / "vectors" / "identity.json"


class Identity(unittest.TestCase):
    def test_the_committed_vectors_are_what_this_code_computes(self):
        self.assertEqual(json.loads(VECTORS.read_text()), reference.make())

    def test_every_part_of_a_space_changes_its_id(self):
        base = reference.make()["cases"][0]["space"]
        changes = [
            {"tenant": "other"}, {"tenant_salt": "01" * 32}, {"model_fingerprint": "00" * 32}, {"dtype": "f16"},
            {"layout": {**base["layout"], "layers": 31}}, {"layout": {**base["layout"], "block_tokens": 32}},
            {"shard": {**base["shard"], "total_layers": 60}}, {"hash_protocol": "vllm_sha256"},
        ]
        ids = {reference.space_id(base)} | {reference.space_id({**base, **change}) for change in changes}
        self.assertEqual(len(ids), 1 + len(changes))


if __name__ == "__main__":
    unittest.main()
