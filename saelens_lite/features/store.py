"""What a feature store holds, and how it is collected: one pass over the text for everything that depends on activations,
and the weights alone for the tokens that a latent promotes or suppresses.

    effect of latent i on the logits = W_dec[i] · W_Uᵀ        (W_U with the final norm's scale folded in)
"""

import hashlib
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeInt
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.config import FrozenConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import NonFiniteError
from saelens_lite.model import LanguageModel
from saelens_lite.progress import progress_bar
from saelens_lite.tokens import TokenRows

N_BINS = 32  # of a histogram; the largest activation lies in the upper half
N_EFFECTS = 10  # tokens kept at either end of a latent's effect on the logits
MAX_LOGITS = 1 << 25  # numbers held at once while effects are computed


class StoreInfo(FrozenConfig):
    """What a feature store was made of."""

    model: str = Field(description="Model name, Hub id or folder.")
    revision: str | None = Field(description="Commit of the model.")
    hook: str = Field(description="transformer-lens hook name.")
    rule: str = Field(description="Sparsity rule of the dictionary.")
    d_sae: int = Field(gt=0, description="Number of latents.")
    n_tokens: int = Field(gt=0, description="Activations encoded.")
    top_n: int = Field(gt=0, description="Most contexts kept for a latent.")
    window: tuple[NonNegativeInt, NonNegativeInt] = Field(description="Tokens shown before and after the peak.")
    bos_id: int | None = Field(description="Token that begins a row.")
    text_sha256: str = Field(description="Hash of token ids and kept positions.")
    dictionary_sha256: str = Field(description="Hash of the dictionary's weights, see `weights_hash`.")


class FeatureTensors(NamedTuple):
    """The numbers of a store. The contexts of a latent come best first; where top_value is 0 there is none.

    Bin j of a histogram counts activations in [j · bin_width, (j + 1) · bin_width); a place is row · n_ctx + position.
    """

    tokens: Int[Tensor, "n_seq n_ctx"]
    length: Int[Tensor, " n_seq"]  # positions of a row up to the last that counts
    count: Int[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    histogram: Int[Tensor, "d_sae n_bins"]
    bin_width: Float[Tensor, " d_sae"]
    top_value: Float[Tensor, "d_sae top_n"]
    top_place: Int[Tensor, "d_sae top_n"]
    top_nearby: Float[Tensor, "d_sae top_n window"]  # activations from window[0] before the peak to window[1] after it
    promoted: Int[Tensor, "d_sae n_effects"]
    promoted_effect: Float[Tensor, "d_sae n_effects"]
    suppressed: Int[Tensor, "d_sae n_effects"]
    suppressed_effect: Float[Tensor, "d_sae n_effects"]


@torch.no_grad()
def collect(dictionary: Dictionary, lm: LanguageModel, rows: TokenRows, info: StoreInfo, batch_tokens: int) -> FeatureTensors:
    """The numbers of a store, from one pass over the rows.

    Raises:
        HookError, ShapeError: the model lacks the hook, or the dictionary has another width.
        NonFiniteError: activations or codes are NaN or infinite.
    """
    device = dictionary.W_enc.device
    firing = _Firing(info, rows.tokens.shape, device)
    per_batch = max(1, batch_tokens // rows.tokens.shape[1])
    with progress_bar("features", rows.n_kept) as advance:
        for start in range(0, len(rows.tokens), per_batch):
            batch = rows.take(slice(start, start + per_batch))
            keep = batch.keep.to(device)
            x = lm.run(batch.tokens, info.hook)[info.hook].to(device)[keep]
            codes = dictionary.encode(x)
            for what, numbers in (("activations", x), ("codes", codes.value)):
                if not torch.isfinite(numbers).all():
                    raise NonFiniteError(
                        f"{info.hook}, rows {start} to {start + len(keep) - 1}: NaN or infinity among the {what}"
                    )
            firing.add(codes, start * rows.tokens.shape[1] + keep.flatten().nonzero().squeeze(1))
            advance(batch.n_kept, "")
    length = (rows.keep * torch.arange(1, rows.keep.shape[1] + 1)).amax(1)
    numbers = (*firing.tensors(), *token_effects(dictionary, lm))
    return FeatureTensors(rows.tokens.int(), length.int(), *(x.cpu() for x in numbers))


class _Entries(NamedTuple):
    """The codes above zero of a batch: place in the text, latent, activation; places ascending."""

    place: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


class _Best(NamedTuple):
    """The strongest contexts so far of each latent, best first; value 0 where there is none."""

    value: Float[Tensor, "d_sae top_n"]
    place: Int[Tensor, "d_sae top_n"]
    nearby: Float[Tensor, "d_sae top_n window"]


class _Firing:
    """What the pass has seen of each latent so far."""

    def __init__(self, info: StoreInfo, shape: tuple[int, int], device: torch.device):
        d_sae, top_n = info.d_sae, info.top_n
        self.n_seq, self.n_ctx = shape
        self.offsets = torch.arange(-info.window[0], info.window[1] + 1, device=device)
        self.count = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(d_sae, N_BINS, dtype=torch.long, device=device)
        self.exponent = torch.zeros(d_sae, dtype=torch.int32, device=device)  # a histogram ends at 2^exponent
        value = torch.zeros(d_sae, top_n, device=device)
        self.best = _Best(value, value.long(), value.new_zeros(d_sae, top_n, len(self.offsets)))

    def add(self, codes: SparseCodes, place: Int[Tensor, " batch"]) -> None:
        """Take in the codes at some places; a batch has whole rows, and batches come in the order of the text."""
        fires = codes.value > 0
        entries = _Entries(place[codes.row[fires]], codes.latent[fires], codes.value[fires].float())
        self.count += torch.bincount(entries.latent, minlength=len(self.count))
        self.total.index_add_(0, entries.latent, entries.value.double())
        self._add_best(entries)
        self._add_to_histogram(entries)

    def _add_best(self, entries: _Entries) -> None:
        """Merge the best entry of each latent in each row into the lists of the latents that gain from it."""
        place, latent, value = entries
        gains = (value > self.best.value[latent, -1]).nonzero().squeeze(1)  # a later row must be better, not equal
        pair = latent[gains] * self.n_seq + place[gains] // self.n_ctx
        order = _best_first(pair, value[gains])
        chosen = gains[order[_starts(pair[order])]]
        chosen = chosen[_best_first(latent[chosen], value[chosen])]
        changed, group, size = latent[chosen].unique_consecutive(return_inverse=True, return_counts=True)
        rank = torch.arange(len(chosen), device=group.device) - (size.cumsum(0) - size)[group]
        fits = rank < self.best.value.shape[1]
        chosen, slot = chosen[fits], (group[fits], rank[fits])
        tables = []
        for old, new in zip(self.best, (value[chosen], place[chosen], self._nearby(entries, chosen)), strict=True):
            table = old.new_zeros(len(changed), *old.shape[1:]).index_put_(slot, new)
            tables.append(torch.cat([old[changed], table], 1))
        order = tables[0].argsort(dim=1, descending=True, stable=True)[:, : self.best.value.shape[1]]
        for old, table in zip(self.best, tables, strict=True):
            old[changed] = torch.take_along_dim(table, order if table.ndim == 2 else order[..., None], 1)

    def _nearby(self, entries: _Entries, chosen: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen window"]:
        """What the latent of each chosen entry does around it: 0 where it does not fire or the row is over."""
        n_places = self.n_seq * self.n_ctx
        keys, order = (entries.latent * n_places + entries.place).sort()
        place = entries.place[chosen, None]
        wanted = entries.latent[chosen, None] * n_places + place + self.offsets
        found = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        position = place % self.n_ctx + self.offsets
        there = (keys[found] == wanted) & (position >= 0) & (position < self.n_ctx)
        return torch.where(there, entries.value[order[found]], 0)

    def _add_to_histogram(self, entries: _Entries) -> None:
        """Count into bins of equal width; where a new maximum widens the range, neighbouring bins merge first."""
        exponent = torch.frexp(self.best.value[:, 0]).exponent
        merged = torch.arange(N_BINS, device=exponent.device) >> (exponent - self.exponent).clamp(0, N_BINS)[:, None]
        self.histogram = torch.zeros_like(self.histogram).scatter_add_(1, merged, self.histogram)
        self.exponent = exponent
        scale = N_BINS * 2.0 ** -exponent.double()  # a power of 2: the product is exact, and so is every merge
        cell = entries.latent * N_BINS + (entries.value * scale[entries.latent]).long()
        added = torch.bincount(cell, minlength=self.histogram.numel())
        self.histogram += added.reshape(self.histogram.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        """From `count` to `top_nearby`, in the order of FeatureTensors."""
        fired = self.count > 0
        mean = torch.where(fired, self.total / self.count, 0).float()
        width = torch.where(fired, 2.0 ** self.exponent.double() / N_BINS, 0).float()
        return self.count, mean, self.histogram, width, *self.best


def _best_first(key: Int[Tensor, " n"], value: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The order by key, then by falling value, then as they came."""
    order = value.argsort(descending=True, stable=True)
    return order[key[order].argsort(stable=True)]


def _starts(key: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Where a run of equal keys begins."""
    return torch.cat([torch.ones_like(key[:1], dtype=torch.bool), key[1:] != key[:-1]])


def token_effects(dictionary: Dictionary, lm: LanguageModel) -> list[Tensor]:
    """Promoted token ids and effects [d_sae N_EFFECTS], then suppressed ones, strongest first.

    Empty [d_sae 0] at a hook of another width than the residual stream, which does not act on the logits directly.
    """
    unembedding = lm.unembedding()
    n = min(N_EFFECTS, len(unembedding)) if dictionary.d_out == unembedding.shape[1] else 0
    chunks = []
    for W_dec in dictionary.W_dec.float().to(unembedding.device).split(max(1, MAX_LOGITS // len(unembedding))):
        logits = W_dec @ unembedding.T if n else W_dec
        high, low = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        chunks.append((high.indices.int(), high.values, low.indices.int(), low.values))
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


@cache
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable ones stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def vocabulary(lm: LanguageModel) -> list[str]:
    r"""The text of every token: bytes that make no whole character as \xe2, a token without text as <its number>."""

    def shown(i: int, text: str) -> str:
        if "\ufffd" not in text:
            return text or f"<{i}>"
        name = lm.tokenizer.convert_ids_to_tokens(i)
        if not all(char in _byte_of() for char in name):
            return name
        return "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in (_byte_of()[char] for char in name))

    return [shown(i, text) for i, text in enumerate(lm.token_strings())]


def weights_hash(dictionary: Dictionary) -> str:
    """SHA-256 over the names, types, shapes and values of a dictionary's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(dictionary.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
