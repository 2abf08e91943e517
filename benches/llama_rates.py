"""llama.cpp's prefill and decode rates for a GGUF model, its weights converted to BF16 first: the yardstick of the
`runtime` bench. Needs `pip install gguf llama-cpp-python==0.3.36` (builds llama.cpp: five minutes, and cmake).

    python benches/llama_rates.py MODEL.gguf THREADS
"""

import pathlib
import statistics
import sys
import tempfile
import time

import gguf
import numpy as np
from llama_cpp import Llama

PROMPT_TOKENS, GENERATED, RUNS = 1024, 64, 5


def to_bf16(source: str, target: str) -> None:
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, sub = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    source, threads = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        path = str(pathlib.Path(scratch) / "bf16.gguf")
        to_bf16(source, path)
        llama = Llama(path, n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        tokens = [position * 7919 % 40_000 for position in range(PROMPT_TOKENS + GENERATED)]
        prefill, decode = [], []
        for run in range(RUNS + 1):
            llama.reset()
            start = time.perf_counter()
            llama.eval(tokens[:PROMPT_TOKENS])
            middle = time.perf_counter()
            for token in tokens[PROMPT_TOKENS:]:
                llama.eval([token])
            end = time.perf_counter()
            if run > 0:  # The first is not counted.
                prefill.append(PROMPT_TOKENS / (middle - start))
                decode.append(GENERATED / (end - middle))
        print(f"llama.cpp, bf16 weights, {threads} threads, medians of {RUNS} runs")
        print(f"prefill of {PROMPT_TOKENS} tokens: {statistics.median(prefill):7.0f} tokens/s")
        print(f"decode at {PROMPT_TOKENS} tokens:  {statistics.median(decode):7.1f} tokens/s")


if __name__ == "__main__":
    main()
