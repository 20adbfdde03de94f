"""Balance: frequent tokens thinned out, so that none has more than a given share of the positions that count.

A single pass decides, row by row: of a token that occurs in a row more often than its share of everything kept so far
allows, that many occurrences are kept, drawn at random. So the text need not be read twice, the cap holds at every moment,
and where in a row or in the text a token stands makes no difference. The draws come from a fixed seed and rows are taken
in order: the same text gives the same positions, and a longer text those of the shorter one first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelens_lite.errors import TextError

LISTED = 50  # tokens named in the record


class TokenBalance:
    """Keeps every token id to max(max_share · n_kept, 1) of the n_kept positions that count."""

    def __init__(self, max_share: float, d_vocab: int):
        self.max_share = max_share
        self.seen, self.kept = np.zeros((2, d_vocab), dtype=np.int64)
        self._random = np.random.default_rng(0)

    def thin(self, tokens: Int[Tensor, "n_seq n_ctx"], keep: Bool[Tensor, "n_seq n_ctx"]) -> Bool[Tensor, "n_seq n_ctx"]:
        """Return the positions that count of those that may, given what has been counted before."""
        ids, thinned = tokens.numpy(), keep.numpy().copy()
        kept = self.kept.copy()
        n_kept = int(kept.sum())
        for row, mask in zip(ids, thinned, strict=True):
            found = row[mask]
            allowed = np.maximum(1, int(self.max_share * n_kept)) - kept[found]
            mask[mask] = chosen = self._ranks(found) < allowed
            np.add.at(kept, found[chosen], 1)
            n_kept += int(chosen.sum())
        return torch.from_numpy(thinned)

    def _ranks(self, ids: np.ndarray) -> np.ndarray:
        """0, 1, 2, … for the occurrences of each id, in random order."""
        order = np.lexsort((self._random.random(len(ids)), ids))
        in_order = ids[order]
        ranks = np.empty(len(ids), dtype=np.int64)
        ranks[order] = np.arange(len(ids)) - np.searchsorted(in_order, in_order)
        return ranks

    def count(self, seen: Int[Tensor, " n"], kept: Int[Tensor, " m"]) -> None:
        """Note the tokens that were to choose from and those that were kept.

        Raises:
            TextError: after a million tokens hardly any is left, for the text has too few different ones.
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
        """Return what was left out as plain data: totals, and the tokens that lost most with their texts."""
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
