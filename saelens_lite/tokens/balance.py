"""Balance: leave out some positions of frequent tokens, so that no token exceeds a given share of the counted positions.

One pass decides row by row. If a row holds more occurrences of a token than its share of all kept positions allows, a random
subset of them is kept. So the text is read only once, the cap holds at every moment, and the place of a token in a row does
not matter. The seed is fixed and rows are read in order: the same text gives the same positions, and a longer text begins with
the positions of the shorter one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelens_lite.errors import TextError

LISTED = 50  # most tokens in the record


class TokenBalance:
    """Keeps every token id to max(max_share · n_kept, 1) of the n_kept positions that count."""

    def __init__(self, max_share: float, d_vocab: int):
        self.max_share = max_share
        self.seen, self.kept = np.zeros((2, d_vocab), dtype=np.int64)
        self._random = np.random.default_rng(0)

    def thin(self, tokens: Int[Tensor, "n_seq n_ctx"], keep: Bool[Tensor, "n_seq n_ctx"]) -> Bool[Tensor, "n_seq n_ctx"]:
        """Return the positions to keep, given the candidates and all earlier counts."""
        ids, thinned = tokens.numpy(), keep.numpy().copy()
        kept = self.kept.copy()
        n_kept = int(kept.sum())
        for row, mask in zip(ids, thinned, strict=True):
            candidates = row[mask]
            allowed = np.maximum(1, int(self.max_share * n_kept)) - kept[candidates]
            mask[mask] = chosen = self._ranks(candidates) < allowed
            np.add.at(kept, candidates[chosen], 1)
            n_kept += int(chosen.sum())
        return torch.from_numpy(thinned)

    def _ranks(self, ids: np.ndarray) -> np.ndarray:
        """Return 0, 1, 2, … for the occurrences of each id, in random order."""
        order = np.lexsort((self._random.random(len(ids)), ids))
        in_order = ids[order]
        ranks = np.empty(len(ids), dtype=np.int64)
        ranks[order] = np.arange(len(ids)) - np.searchsorted(in_order, in_order)
        return ranks

    def count(self, seen: Int[Tensor, " n"], kept: Int[Tensor, " m"]) -> None:
        """Add to the counts of the tokens seen and kept.

        Raises:
            TextError: hardly any of a million tokens are kept, because the text has too few distinct tokens.
        """
        self.seen += np.bincount(seen.numpy(), minlength=len(self.seen))
        self.kept += np.bincount(kept.numpy(), minlength=len(self.kept))
        n_seen, n_kept = int(self.seen.sum()), int(self.kept.sum())
        if n_seen > 1_000_000 + 1000 * n_kept:
            raise TextError(
                f"max_token_share = {self.max_share} leaves {n_kept:,} of {n_seen:,} positions: the text has only "
                f"{np.count_nonzero(self.seen):,} different tokens; raise the share"
            )

    def record(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return the positions left out as plain data: totals, and the tokens that lost most, with their texts."""
        lost = self.seen - self.kept
        n_kept = int(self.kept.sum())
        worst = sorted(np.flatnonzero(lost).tolist(), key=lambda i: (-lost[i], i))
        return {
            "max_token_share": self.max_share,
            "n_seen": int(self.seen.sum()),
            "n_kept": n_kept,
            "largest_share": float(self.kept.max()) / max(1, n_kept),
            "n_capped_ids": len(worst),
            "most_capped": [
                {"id": i, "token": texts[i], "seen": int(self.seen[i]), "kept": int(self.kept[i])} for i in worst[:LISTED]
            ],
        }
