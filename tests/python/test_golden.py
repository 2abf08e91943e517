"""The committed golden file, recomputed with transformers where that is installed."""

import json
import pathlib
import tempfile
import unittest

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tiny_models.json"

try:
    import tiny_models
except ImportError as error:
    tiny_models, missing = None, str(error)


class Golden(unittest.TestCase):
    def test_transformers_still_computes_the_same(self):
        if tiny_models is None:
            self.skipTest(f"SKIPPED: transformers and torch are not installed ({missing})")
        golden = json.loads(GOLDEN.read_text())
        self.assertEqual(golden["prompt"], tiny_models.PROMPT)
        for kind, expected in golden["models"].items():
            with tempfile.TemporaryDirectory() as scratch:
                folder = pathlib.Path(scratch)
                tiny_models.write_checkpoint(kind, folder)
                found = tiny_models.run(folder)
            self.assertEqual(found["greedy"], expected["greedy"], kind)
            for row, logits in expected["logits"].items():
                for a, b in zip(found["logits"][row], logits, strict=True):
                    self.assertLess(abs(a - b), 1e-4, kind)


if __name__ == "__main__":
    unittest.main()
