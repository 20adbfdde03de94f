"""Token rows of a text of any length: in memory if they are few, else in temporary files, which the system reads as needed."""

import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelens_lite.files import disk_full_is_typed
from saelens_lite.tokens import RowBlocks, TokenRows
from saelens_lite.tokens.rows import joined

IN_MEMORY = 1 << 24  # positions


def rows_of(blocks: RowBlocks, folder: Path | None) -> TokenRows:
    """Return the rows of all blocks, as `token_rows` does. Files without a name in `folder` hold them if they are many."""
    waiting, n, left = [], 0, iter(blocks)
    for block in left:
        waiting.append(block)
        n += block.tokens.numel()
        if n > IN_MEMORY:
            return _on_disk(itertools.chain(waiting, left), blocks, folder)
    return joined(waiting, blocks.pad)


def _on_disk(parts: Iterable[TokenRows], blocks: RowBlocks, folder: Path | None) -> TokenRows:
    """Return rows in files, with token ids of four bytes."""
    n_ctx, lengths, widths, is_padded, ends_text = blocks.n_ctx, [], set(), False, True
    with (
        tempfile.TemporaryFile(dir=folder) as tokens,
        tempfile.TemporaryFile(dir=folder) as keep,
        disk_full_is_typed(folder or Path(tempfile.gettempdir())),
    ):
        for part in parts:
            missing = (0, n_ctx - part.tokens.shape[1])
            tokens.write(F.pad(part.tokens.int(), missing, value=blocks.pad).numpy().data)
            keep.write(F.pad(part.keep, missing).numpy().data)
            lengths.append(part.lengths)
            widths.add(part.tokens.shape[1])
            is_padded, ends_text = is_padded or part.length is not None, ends_text and part.ends_text
        length = torch.cat(lengths) if is_padded or len(widths) > 1 else None
        whole = TokenRows(_mapped(tokens, np.int32, n_ctx), _mapped(keep, np.bool_, n_ctx), length, ends_text)
        return whole.narrowed(max(widths))


def _mapped(file: BinaryIO, dtype: type, n_ctx: int) -> Tensor:
    """Return the content of a file as a tensor. The file may be closed then."""
    file.flush()
    return torch.from_numpy(np.memmap(file, dtype, "c").reshape(-1, n_ctx))  # "c": a change would not reach the file
