"""The GPU path of the sparse core: everything that runs as Triton kernels.

Nothing here waits for the GPU unless its docstring says so. Sums are float32 and in an order that depends on the support alone:
no atomics in them, same input, same bytes. Import this module through `saelens_lite.codes.gpu.kernels`: it imports Triton.
"""

from saelens_lite.codes.triton_optimizer import adam_rows_
from saelens_lite.codes.triton_products import decode, pair_products, transposed_product
from saelens_lite.codes.triton_select import topk
from saelens_lite.codes.triton_threshold import above, n_largest

__all__ = ["above", "adam_rows_", "decode", "n_largest", "pair_products", "topk", "transposed_product"]
