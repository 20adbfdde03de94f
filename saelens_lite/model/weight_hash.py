"""Hashes of the weights of a module, the same on every device.

The hash of all entries is the SHA-256 of the name, shape, dtype and block sums of each weight. A weight is read as one row of
64-bit words wᵢ, in blocks of 2^15. The sum of a block is

    Σ kᵢ₊₁ (m xor (m >> 32)),    m = kᵢ wᵢ,    all modulo 2^64,

with odd, fixed pseudo-random numbers kᵢ. Sums of integers are exact, so their order does not matter: a GPU adds its weights
up itself and sends one number a block. The xor carries the highest bits to lower ones; without it, two changes of a sign would
cancel. Different weights have the same sums by chance, about once in 2^32 for each block that differs.
"""

import hashlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from saelens_lite.fingerprints import Fingerprint
from saelens_lite.model.spread import weights

BLOCK = 1 << 15  # words of 8 bytes
BLOCKS_AT_ONCE = 512  # on a GPU, 128 MB; a CPU takes one for each thread, which fits in its cache
SAMPLED_ENTRIES = 256  # per weight


def fingerprint_of(module: nn.Module) -> Fingerprint:
    """Return the fingerprint of the weights of a module."""
    whole, sampled = hashlib.sha256(), hashlib.sha256()
    for name, weight in weights(module):
        entries = weight.detach().reshape(-1)
        whole.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        sums, rest = block_sums(entries)
        whole.update(sums.numpy().astype("<i8").tobytes() + rest.numpy().tobytes())
        sampled.update(f"{name} {tuple(weight.shape)}\n".encode())
        some = entries[:: max(1, len(entries) // SAMPLED_ENTRIES)].cpu().contiguous()
        sampled.update(some.view(torch.uint8).numpy().tobytes())
    return Fingerprint(whole.hexdigest(), sampled.hexdigest())


def block_sums(entries: Tensor) -> tuple[Int[Tensor, " blocks"], UInt8[Tensor, " rest"]]:
    """Return the sums of the blocks of a row of entries, and the last bytes that fill no word, on the CPU."""
    as_bytes = entries.contiguous().view(torch.uint8)
    n = len(as_bytes) // 8 * 8
    as_words = as_bytes[:n]
    if as_words.storage_offset() % 8:
        as_words = as_words.clone()
    sums = [_sums(piece) for piece in _pieces(as_words.view(torch.int64))]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(one.cpu() for one in sums)]), as_bytes[n:].cpu()


def _pieces(words: Int[Tensor, " words"]) -> Iterator[Int[Tensor, "blocks word"]]:
    """Yield words as some blocks at a time, the last of which may be short. Only CPUs and CUDA devices add up themselves."""
    at_once = {"cpu": torch.get_num_threads(), "cuda": BLOCKS_AT_ONCE}.get(words.device.type)
    n_whole = len(words) // BLOCK * BLOCK
    for piece in (*words[:n_whole].split(BLOCK * (at_once or BLOCKS_AT_ONCE)), words[n_whole:]):
        if len(piece):
            here = piece if at_once else piece.cpu()
            yield here.view(-1, min(BLOCK, len(piece)))


def _sums(words: Int[Tensor, "blocks word"]) -> Int[Tensor, " blocks"]:
    k, n = _multipliers(words.device), words.shape[1]
    m = words * k[:n]
    return m.bitwise_xor_(m >> 32).mul_(k[1 : n + 1]).sum(1)


@cache
def _multipliers(device: torch.device) -> Int[Tensor, " word"]:
    """Return odd numbers. Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators (SplitMix64)."""
    z = np.arange(1, BLOCK + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ z >> np.uint64(shift)) * np.uint64(factor)
    return torch.from_numpy((z | np.uint64(1)).view(np.int64)).to(device)
