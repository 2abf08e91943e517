"""Tiny seeded models and what Hugging Face transformers computes with them.

`python tiny_models.py make FOLDER` writes the checkpoints; `python tiny_models.py golden FILE` writes what
transformers computes with them. The weights come from a generator that is defined here and in the Rust test
(`tests/tests/reference.rs`), so that the committed golden file needs no weights beside it.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
PROMPT = [(7 * i * i + 3 * i + 5) % VOCABULARY for i in range(53)]
GREEDY_TOKENS = 12

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "torch_dtype": "float32", "hidden_act": "silu",
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}
MODELS = {
    "llama": {"model_type": "llama", "rope_theta": 10000.0, "tie_word_embeddings": True},
    "llama3": {
        "model_type": "llama", "rope_theta": 500000.0, "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64},
    },
    "qwen2": {"model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1000000.0, "tie_word_embeddings": False},
}


def values(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1) from a tensor's name: FNV-1a of the name, then xorshift64* a number."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = ((state ^ byte) * 0x100000001B3) % 2**64
    out = np.empty(count, dtype=np.float32)
    for i in range(count):
        state ^= state >> 12
        state = (state ^ (state << 25)) % 2**64
        state ^= state >> 27
        out[i] = ((state * 0x2545F4914F6CDD1D % 2**64) >> 40) / 2.0**23 - 1.0
    return out


def tensor(name: str, shape: tuple) -> torch.Tensor:
    raw = torch.from_numpy(values(name, int(np.prod(shape))).reshape(shape))
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * raw
    if name.endswith(".bias"):
        return 0.1 * raw
    return raw * (3.0 / shape[-1]) ** 0.5


def write_checkpoint(kind: str, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**COMMON, **MODELS[kind]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    names = {n: tuple(p.shape) for n, p in model.named_parameters()}
    save_file({n: tensor(n, s) for n, s in names.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def run(folder: pathlib.Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
        tokens = list(PROMPT)
        for _ in range(GREEDY_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    rows = {str(r): [round(float(x), 6) for x in logits[r]] for r in (0, 17, len(PROMPT) - 1)}
    return {"logits": rows, "greedy": tokens[len(PROMPT):]}


def main() -> None:
    verb, target = sys.argv[1], pathlib.Path(sys.argv[2])
    if verb == "make":
        for kind in MODELS:
            write_checkpoint(kind, target / kind)
        return
    assert verb == "golden", "make or golden"
    import tempfile
    import transformers

    golden = {"made_by": f"transformers {transformers.__version__}, torch {torch.__version__}", "prompt": PROMPT,
              "models": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in MODELS:
            folder = pathlib.Path(scratch) / kind
            write_checkpoint(kind, folder)
            config = {**COMMON, **MODELS[kind]}
            golden["models"][kind] = {"config": config, **run(folder)}
    target.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
