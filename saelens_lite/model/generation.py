"""Text generation from a prompt, with a key-value cache if the model has one that gives correct logits."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.devices import float32_products
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError, TextError

PROBE_PROMPT, PROBE_STEPS = 6, 3  # tokens for the test of a cache: more than the width of usual convolutions
log = logging.getLogger(__name__)


def generate(
    lm: Any,
    prompt: Any,
    max_new_tokens: int,
    *,
    temperature: float | int,
    top_k: int | None,
    seed: int,
    prepend_bos: bool | None = None,
) -> str:
    """Return the prompt and its continuation; see `LanguageModel.generate`."""
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature = {temperature}; expected a finite number, 0 or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k = {top_k}; expected 1 or more, or None for all tokens")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens}; expected 1 or more")
    if not isinstance(prompt, str):
        raise TextError(f"a prompt must be one string; found a {type(prompt).__name__}")
    lm.check_causal("generate")
    tokens = lm._read(prompt, None, prepend_bos).tokens
    if tokens.shape[1] >= lm.n_ctx:
        length = len(lm.text_tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        raise ShapeError(
            f"the prompt has {length} tokens; {lm.name} reads at most {lm.n_ctx} with the BOS token and the continuation; "
            "shorten the prompt"
        )
    n_new = min(max_new_tokens, lm.n_ctx - tokens.shape[1])
    generator = torch.Generator(lm.device).manual_seed(seed)
    ends = end_ids(lm)
    next_logits = _cached_logits(lm) if not lm.n_in_whole_rows and lm.has_usable_cache else _recomputed_logits(lm)
    lm.row_length = tokens.shape[1] + n_new
    try:
        for _ in range(n_new):
            new = _choose(next_logits(tokens), temperature, top_k, generator)
            if int(new) in ends:
                break
            tokens = torch.cat([tokens, new], dim=1)
    finally:
        lm.row_length = None
    ids = tokens[0].tolist()
    return lm.decode(ids[1:] if ids[0] == lm.bos_id else ids)


def end_ids(lm: Any) -> set[int]:
    """Return the token ids that end a text, according to the tokenizer and the model's generation settings."""
    settings = getattr(lm.module, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ids = named if isinstance(named, list | tuple) else [named]
    return {i for i in (lm.eos_id, *ids) if i is not None}


def _choose(
    logits: Float[Tensor, "one d_vocab"], temperature: float | int, top_k: int | None, generator: torch.Generator
) -> Int[Tensor, "one one"]:
    """Return the next token: the likeliest at temperature 0, else a draw."""
    if not torch.isfinite(logits.max()):  # NaN counts as the largest
        raise NonFiniteError("the model's logits are NaN or infinite; is the value of an edit too large?")
    likeliest = logits.argmax(-1, keepdim=True)
    if temperature == 0:
        return likeliest
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    logits = logits / temperature
    if not torch.isfinite(logits.max()):  # a temperature so low that they overflow
        return likeliest
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _cached_logits(lm: Any) -> Callable[[Int[Tensor, "one pos"]], Float[Tensor, "one d_vocab"]]:
    """Return a function from a growing row to its next-token logits; it runs the model over the new tokens only."""
    past: Any = None
    n_done = 0

    def step(tokens: Tensor) -> Tensor:
        nonlocal past, n_done
        with float32_products(lm.tf32):
            out = lm.module(tokens[:, n_done:], past_key_values=past, use_cache=True)
        past, n_done = out.past_key_values, tokens.shape[1]
        return out.logits[:, -1].float()

    return step


def _recomputed_logits(lm: Any) -> Callable[[Int[Tensor, "one pos"]], Float[Tensor, "one d_vocab"]]:
    """Return a function from a row to its next-token logits; it runs the model over the whole row."""

    def step(tokens: Tensor) -> Tensor:
        with float32_products(lm.tf32):
            return lm.module(tokens, use_cache=False).logits[:, -1].float()

    return step


@torch.no_grad()
def cache_is_usable(lm: Any) -> bool:
    """Return whether the model gives the same logits with a key-value cache as without, tested on a few tokens.

    They may differ by the square root of the rounding unit, relative to the largest logit. Recurrent models have another
    kind of cache or none, and some models give different logits with their cache.
    """
    n = min(PROBE_PROMPT + PROBE_STEPS, lm.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(lm.d_vocab, (1, n), generator=generator).to(lm.device)
    first = max(1, n - PROBE_STEPS)
    try:
        recomputed = lm.module(tokens, use_cache=False).logits.float()
        past, stops = None, range(first, n + 1)
        parts = []
        for start, stop in zip([0, *stops], stops, strict=False):
            out = lm.module(tokens[:, start:stop], past_key_values=past, use_cache=True)
            past = out.past_key_values
            if past is None:
                return False
            parts.append(out.logits.float())
        error = (torch.cat(parts, dim=1) - recomputed).abs().max()
    except Exception as why:  # a missing cache raises a different error in each model family
        log.debug("%s with a cache: %s: %s", type(lm.module).__name__, type(why).__name__, why)
        return False
    eps = max(torch.finfo(dtype).eps for dtype in (lm.dtype, torch.float32))
    return bool(error <= eps**0.5 * recomputed.abs().max())
