"""The worker that runs a decoder in llama.cpp: as many prompt tokens, as many tokens written."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from npvlm.work.peers.process import Round, serve


def load(settings: dict[str, Any]) -> tuple[str, Callable[[], Round]]:
    """Open settings["file"]; the prompt is settings["prompt_tokens"] ordinary tokens.

    The library's C functions are called as they are: its Python class wants a vocabulary.
    """
    llama = import_module("llama_cpp")
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(settings["file"].encode(), options)
    if not model:
        raise SystemExit("it cannot read the file that was made for it")
    length, new_tokens = settings["prompt_tokens"], settings["new_tokens"]
    options = llama.llama_context_default_params()
    options.n_ctx = length + new_tokens
    options.n_batch = length
    options.n_threads = options.n_threads_batch = settings["threads"]
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise SystemExit("it has no room for the tokens")
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    prompt = [5 + i % 1000 for i in range(length)]

    def read(tokens: list[int]) -> int:
        """Take tokens in and name the likeliest next one."""
        array = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("it refuses the tokens")
        scores = llama.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(scores, (vocabulary,)).argmax())

    def run() -> Round:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        began = time.perf_counter()
        token = first = read(prompt)
        seen = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = read([token])
        return Round(None, seen - began, None, time.perf_counter() - seen, [first])

    return f"llama.cpp of llama-cpp-python {llama.__version__} {settings['kind']}", run


if __name__ == "__main__":
    serve(load)
