"""Perplexity and logits of a GGUF file in llama.cpp beside those of the folder it was made from in Transformers.

    PYTHONPATH=. python tests/benchmarks/llama_cpp.py sliced sliced.gguf --dataset demo --length 512 --samples 10

llama.cpp runs on the CPU, on the same token numbers, by way of one of its Python bindings: llama-cpp-py-sync or
llama-cpp-cffi, which are not part of the requirements. Attention's cache is fp32 there, as in Transformers.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import slicing
from slicing.files import write_json


def main(argv: Sequence[str] | None = None) -> None:
    """Two rows to stdout, all figures to the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder")
    parser.add_argument("file", help="the GGUF file of the same model")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--length", type=int, default=512, help="tokens per window of the test split")
    parser.add_argument("--samples", type=int, default=10, help="windows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    model, tokenizer = slicing.load_model(options.model, device="cpu", dtype="float32")
    test = slicing.token_windows(options.dataset, tokenizer, split="test", length=options.length, count=options.samples)
    found = compare(model, options.file, test, options.threads)
    print("| | perplexity |\n|---|---:|")
    for name in ("Transformers", "llama.cpp"):
        print(f"| {name} | {found[name]:.4f} |")
    print(f"largest difference of a logit: {found['difference']:.2e} (the largest is {found['largest']:.2f})")
    if options.json:
        write_json(Path(options.json), found)


def compare(model: PreTrainedModel, file: str, windows: torch.Tensor, threads: int = 1) -> dict[str, float]:
    """Both perplexities, the largest logit, and the largest difference between logits, on windows (N, S)."""
    nll: dict[str, list[float]] = {"Transformers": [], "llama.cpp": []}
    largest = difference = 0.0
    with llama(file, windows.shape[1], threads) as forward, torch.inference_mode():
        for window in windows:
            pair = {"Transformers": model(input_ids=window[None], use_cache=False).logits[0].float()}
            pair["llama.cpp"] = forward(window)
            for name, logits in pair.items():
                nll[name].append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]).item())
            largest = max(largest, pair["Transformers"].abs().max().item())
            difference = max(difference, (pair["llama.cpp"] - pair["Transformers"]).abs().max().item())
    found = {name: torch.tensor(each).double().mean().exp().item() for name, each in nll.items()}
    return found | {"largest": largest, "difference": difference}


def binding() -> tuple[Any, Any]:
    """cffi's object and llama.cpp's library of the first binding that loads; ImportError if none does."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        return get_ffi(), get_lib()
    except (ImportError, RuntimeError):
        from llama.llama_cpp import ffi, lib

        return ffi, lib


@contextmanager
def llama(file: str, length: int, threads: int) -> Iterator[Any]:
    """A function of tokens (S <= length) that gives llama.cpp's logits (S, V)."""
    ffi, lib = binding()
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(file).encode(), options)
    if model == ffi.NULL:
        raise RuntimeError(f"llama.cpp doesn't read {file}")
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = 0  # fp32
    context = lib.llama_init_from_model(model, options)
    batch = lib.llama_batch_init(length, 0, 1)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        if hasattr(lib, "llama_memory_clear"):
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
        else:  # before June 2025
            lib.llama_kv_self_clear(context)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens.tolist()):
            batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        if code := lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        numbers = ffi.buffer(lib.llama_get_logits(context), 4 * len(tokens) * size)
        return torch.frombuffer(bytearray(numbers), dtype=torch.float32).view(len(tokens), size)

    try:
        yield forward
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        lib.llama_model_free(model)


if __name__ == "__main__":
    main()
