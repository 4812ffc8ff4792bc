"""The worker that runs a checkpoint in transformers, as people do: sdpa, cache, greedy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from npvlm.work.peers.process import Round, serve


def load(settings: dict[str, Any]) -> tuple[str, Callable[[], Round]]:
    """Open settings["folder"] in settings["dtype"]; ids [N, T] and pixels come from a file.

    torch and transformers are imported by name: npvlm is used and checked without them.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch, transformers = import_module("torch"), import_module("transformers")
    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    dtype = getattr(torch, settings["dtype"])
    model, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        settings["folder"], dtype=dtype, output_loading_info=True
    )
    strangers = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if strangers:
        raise SystemExit(f"it does not know the weights: {strangers[0]}")
    model.eval()

    with np.load(settings["inputs"]) as inputs:
        ids = torch.from_numpy(inputs["ids"])
        pixels = torch.from_numpy(inputs["pixels"]).to(dtype)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": pixels,
    }
    # No token ends an answer, so every round is equally long.
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=settings["new_tokens"], do_sample=False, use_cache=True, pad_token_id=0
    )
    times: list[float] = []

    def look_at_the_clock(*seen: Any, **more: Any) -> None:
        """Called where the image tower begins and where its features are ready."""
        times.append(time.perf_counter())

    def never_stop(ids: Any, scores: Any, **more: Any) -> Any:
        """Called after every token."""
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    model.model.vision_tower.register_forward_pre_hook(look_at_the_clock)
    model.model.multi_modal_projector.register_forward_hook(look_at_the_clock)

    def run() -> Round:
        times.clear()
        began = time.perf_counter()
        answer = model.generate(**batch, stopping_criteria=[never_stop])
        if len(times) != 2 + settings["new_tokens"]:
            raise SystemExit(f"it wrote {len(times) - 2} tokens, not {settings['new_tokens']}")
        image, first = times[1] - times[0], times[2] - began
        tokens = answer[:, ids.shape[1]].tolist()
        return Round(image, first - image, first, times[-1] - times[2], tokens)

    return f"transformers {transformers.__version__} {settings['dtype']}", run


if __name__ == "__main__":
    serve(load)
