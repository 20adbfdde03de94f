"""The loss of the last share of a training: KL between the predictions of the model and those with the reconstruction in place.

The squared error weighs all directions of an activation alike; the rest of the model does not. So in the last `kl_share` of the
tokens, each batch holds whole token rows, and x̂ replaces the activation at the positions that count:

    kl   = mean over these positions of KL(p ‖ q)          p, q: next-token distributions without and with x̂, in nats
    loss = (mse + c · s · kl) / (1 + c) + losses of the rule          s = mse / kl, without gradient; c = `kl_coefficient`

Each step computes s anew. So both parts have the same size for c = 1, and the weighted mean keeps the size of mse, so that the
penalties of the rule keep their weight. The frozen model runs once without x̂, which also gives the activations, and for each
dictionary once with x̂, from the hook on, forward and backward. Only the dictionary gets gradients.

The share begins with the batch whose beginning is nearest to it, with the last one at the latest. The log has `kl` from there
on, and the dictionary's record says after how many tokens that was (`kl_after`).

Positions that do not count keep their activation: special tokens, padding and excluded positions, as in
`saelens_lite.evaluate`. If a dictionary writes several hooks of a model, all are replaced together.

Source: Karvonen 2025, Revisiting End-To-End Sparse Autoencoder Training: A Short Finetune Is All You Need, arXiv:2503.17272,
which balances mse and KL anew in each step; the last 25 M tokens, a few percent of a training, closed 20 to 50 % of the gap in
cross-entropy. Training with KL from the beginning: Braun, Taylor, Goldowsky-Dill and Sharkey 2024, arXiv:2405.12241. Ours: a
weighted mean in place of a sum, and a learning rate of its own, `kl_lr` times that of the schedule.

On the embedded model (`scripts/comparisons/kl_finetune.py`, L0 8, 600,000 tokens of which a fifth has KL), topk, batch_topk and
jumprelu closed 18, 20 and 22 % of the gap. A finished dictionary that trained on 120,000 more tokens closed 32, 37 and 40 %
with KL, and 13, 15 and 15 % without.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saelens_lite import processes
from saelens_lite.cache import Batch
from saelens_lite.config import TrainConfig
from saelens_lite.errors import ConfigError
from saelens_lite.model import LanguageModel
from saelens_lite.model.partial_forward import PartialForward
from saelens_lite.ports import Hooks, together
from saelens_lite.tokens import TokenRows

LEAST_KL = 1e-6  # nats; smaller values are rounding
CHUNK_LOGITS = 1 << 23  # logits whose log-softmax is computed at a time
PROBE_TOKENS = 16

Divergence = Callable[[Float[Tensor, "n d_out"]], Float[Tensor, ""]]


def with_kl(
    losses: dict[str, Float[Tensor, ""]], kl: Float[Tensor, ""], coefficient: float
) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, ""]]:
    """Return the losses with kl among them, and the loss to minimise."""
    mse = losses["mse"]
    scale = coefficient * mse.detach() / kl.detach().clamp(min=LEAST_KL)
    others = [loss for name, loss in losses.items() if name != "mse"]
    return {**losses, "kl": kl}, torch.stack([(mse + scale * kl) / (1 + coefficient), *others]).sum()


def check_kl(config: TrainConfig, source: Any, hooks: Hooks) -> None:
    """Raise an error now if the last share of a training could not run.

    Raises:
        ConfigError: the source has no token rows or no single model, several processes train, or the model does not predict the
            next token or has no gradients.
        HookError: a hook cannot be replaced, or the model computes a hook that is written before the one that is read.
    """
    if not config.kl_share:
        return
    lm, asked = getattr(source, "lm", None), f"kl_share = {config.kl_share:g}"
    if not hasattr(source, "row_batches"):
        raise ConfigError(
            f"{asked} runs the model on whole token rows, and {type(source).__name__} has only activations; train on a text: "
            "sl.ActivationStream(lm, text, hooks), or --text and --model"
        )
    if not isinstance(lm, LanguageModel) or any(hook not in source.hooks for hook in hooks.all):
        raise ConfigError(f"{asked} works with the hooks of one model; leave it out for dictionaries of several models")
    if processes.team().world > 1:
        raise ConfigError(f"{asked} works in one process; train without --devices, or leave out kl_share")
    lm.check_causal(f"{asked}, which compares predictions of the next token,")
    if hooks.reads != hooks.writes and len(hooks.reads) == len(hooks.writes) == 1:
        lm.check_order(hooks.reads[0], hooks.writes[0])
    _try_out(lm, hooks)


def _try_out(lm: LanguageModel, hooks: Hooks) -> None:
    """Raise ConfigError unless gradients flow back to the hooks that are written."""
    tokens = _probe(lm)
    model = ModelOnRows(lm, tuple(hooks.all))
    model.prepare(hooks.writes)
    batch = model.read(TokenRows(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    y = together(batch, hooks.writes).detach().requires_grad_()
    model.divergence(hooks.writes)(y).backward()
    if y.grad is None or not torch.isfinite(y.grad).all():
        raise ConfigError(f"no finite gradient flows through {lm.name} to {' + '.join(hooks.writes)}; leave out kl_share")


def _probe(lm: LanguageModel) -> Int[Tensor, "one pos"]:
    return (torch.arange(min(PROBE_TOKENS, lm.n_ctx)) % lm.d_vocab)[None].to(lm.device)


class ModelOnRows:
    """A frozen model on one batch of whole rows at a time: without changes, and with reconstructions in place.

    Memory holds two sets of logits and one of their gradients, in the model's number type.
    """

    def __init__(self, lm: LanguageModel, hooks: tuple[str, ...]):
        self.lm, self.hooks = lm, hooks
        self._partial: dict[tuple[str, ...], PartialForward] = {}
        self._tokens: Int[Tensor, "n pos"] | None = None
        self._row: Int[Tensor, " n_kept"] | None = None
        self._position: Int[Tensor, " n_kept"] | None = None
        self._acts: dict[str, Tensor] = {}
        self._clean: Float[Tensor, "n pos d_vocab"] | None = None

    def prepare(self, writes: tuple[str, ...]) -> None:
        """Make ready for reconstructions at these hooks, before `read`."""
        if writes not in self._partial:
            self._partial[writes] = PartialForward(self.lm, writes, _probe(self.lm))

    def read(self, rows: TokenRows) -> Batch:
        """Run the model on rows, and return the activations at the positions that count, row by row. `prepare` comes first."""
        self._tokens = rows.tokens.to(self.lm.device)
        self._row, self._position = (index.to(self.lm.device) for index in rows.keep.nonzero(as_tuple=True))
        main, *others = self._partial.values()
        with ExitStack() as stack:
            stack.enter_context(_fixed_order(self.lm.device))
            for other in others:
                stack.enter_context(other.noting())
            self._acts, self._clean = main.read(self._tokens, self.hooks)
        return {hook: x[self._row, self._position] for hook, x in self._acts.items()}

    def divergence(self, writes: tuple[str, ...]) -> Divergence:
        """Return the function from x̂ at the positions that count (raw activations) to the mean KL in nats; differentiable."""
        partial = self._partial[writes]
        y = together(self._acts, writes)

        def kl_of(x_hat: Float[Tensor, "n d_out"]) -> Float[Tensor, ""]:
            leaf = x_hat.detach().to(self.lm.device).requires_grad_()
            with torch.enable_grad(), _fixed_order(self.lm.device):
                new = y.index_put((self._row, self._position), leaf.to(y.dtype))
                logits = partial.logits(self._tokens, new, differentiable=True)
                total, slope = _kl_and_slope(logits.detach(), self._clean, self._row, self._position)
                (gradient,) = torch.autograd.grad(logits, leaf, slope)
            n = len(x_hat)
            return _Known.apply(x_hat, (total / n).to(x_hat), (gradient / n).to(x_hat))

        return kl_of


class _Known(torch.autograd.Function):
    """A number whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return above * gradient, None, None


def _fixed_order(device: torch.device) -> AbstractContextManager:
    """Return a block in which sums of attention have a fixed order; on CUDA, its faster kernels add up in any."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def _kl_and_slope(
    new: Float[Tensor, "n pos d_vocab"],
    clean: Float[Tensor, "n pos d_vocab"],
    row: Int[Tensor, " n_kept"],
    position: Int[Tensor, " n_kept"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "n pos d_vocab"]]:
    """Return Σ KL(p ‖ q) over the positions that count, and its gradient q − p at the new logits, a part at a time."""
    dtype = torch.promote_types(new.dtype, torch.float32)
    slope, total = torch.zeros_like(new), new.new_zeros((), dtype=dtype)
    for i, j in _parts(row, position, max(1, CHUNK_LOGITS // new.shape[-1])):
        log_p, log_q = (logits[i, j].to(dtype).log_softmax(-1) for logits in (clean, new))
        p = log_p.exp()
        total += (p * (log_p - log_q)).sum()
        slope[i, j] = (log_q.exp() - p).to(slope.dtype)
    return total, slope


def _parts(row: Tensor, position: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(row.split(size), position.split(size), strict=True)
