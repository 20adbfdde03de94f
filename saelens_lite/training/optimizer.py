"""Adam for the parameters of a dictionary, with clipping by the norm of the whole gradient.

On a GPU, one kernel passes once over each weight: it clips, takes the step, brings rows back to norm 1 if the rule wants that,
and writes the copy in bfloat16 from which the next support is chosen. All other parameters, and all on other devices, are
updated by torch's fused Adam.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.codes import gpu
from saelens_lite.dictionary import Dictionary

EPS = 1e-8


class Adam:
    """Adam on the parameters of a dictionary.

    Its parameters are contiguous, because Adam is several times faster on contiguous memory: W_encᵀ stands for W_enc.

    halves: keep `rounded`, a copy of W_enc in bfloat16.
    unit_decoder: bring the rows of W_dec back to norm 1. Only a GPU does that here.
    """

    def __init__(self, dictionary: Dictionary, lr: float, betas: tuple[float, float], *, halves: bool, unit_decoder: bool):
        self.parameters = {
            name: p.detach().T.requires_grad_() if name == "W_enc" else p for name, p in dictionary.named_parameters()
        }
        self.torch = torch.optim.Adam(self.parameters.values(), lr=lr, betas=betas, eps=EPS, fused=True)
        self._dictionary, self._betas = dictionary, betas
        self._kernels = gpu.kernels(dictionary.W_enc)
        self._unit_decoder = unit_decoder
        self._encoder = "W_enc" if "W_enc" in self.parameters else "W_dec"
        self._halves = halves and self._kernels is not None
        self._rounded: tuple[Tensor, int] | None = None  # the copy, and the version of the weight it was made from

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.torch.param_groups[0]["lr"]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The step and the moments of each parameter: step, exp_avg and exp_avg_sq."""
        return self.torch.state

    @property
    def rounded(self) -> Float[Tensor, "d_in d_sae"] | None:
        """W_enc in bfloat16, or None if no copy is kept."""
        if not self._halves:
            return None
        weight = self.parameters[self._encoder]
        if self._rounded is None or self._rounded[1] != weight._version:  # which the kernel leaves as it is
            self._rounded = weight.detach().bfloat16(), weight._version
        return self._rounded[0].T

    @torch.no_grad()
    def step(self, lr: float, n_steps: int, scale: Float[Tensor, ""] | None, stopped: Tensor | None) -> None:
        """Update the parameters with the gradients of the dictionary's parameters.

        Args:
            n_steps: number of steps including this one.
            scale: number by which the gradient is divided.
            stopped: if true, nothing changes. The kernel needs it.
        """
        for name, parameter in self._dictionary.named_parameters():
            if (updated := self.parameters[name]) is not parameter:
                updated.grad = None if parameter.grad is None else parameter.grad.T
        self.torch.param_groups[0]["lr"] = lr
        self.torch.grad_scale = None if scale is None else scale.float()  # which float64 needs too
        self.torch.found_inf = None if stopped is None else stopped.float()
        if self._kernels is not None:
            self._step_of_rows(lr, n_steps, scale, stopped)
        self.torch.step()

    def free_gradients(self) -> None:
        """Free the memory of the gradients, which the next dictionary of the loop needs."""
        for name, parameter in self._dictionary.named_parameters():
            parameter.grad = self.parameters[name].grad = None

    def _step_of_rows(self, lr: float, n_steps: int, scale: Tensor | None, stopped: Tensor) -> None:
        """Update W_dec and W_enc by the kernel, and leave no gradient for torch's Adam."""
        new = self._dictionary.W_dec.new_full
        beta1, beta2 = self._betas
        numbers = {
            "scale": new((), 1.0) if scale is None else scale.reciprocal(),
            "step_size": new((), lr / (1 - beta1**n_steps)),
            "root": new((), (1 - beta2**n_steps) ** -0.5),
        }
        for name in ("W_dec", "W_enc"):
            p = self.parameters.get(name)
            if p is None or p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state |= {"step": new((), 0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            half = self.rounded.T if self._halves and name == self._encoder else None
            self._kernels.adam_rows_(
                p.detach(), state["exp_avg"], state["exp_avg_sq"], p.grad,
                half=half, unit=self._unit_decoder and name == "W_dec", skip=stopped, betas=self._betas, eps=EPS, **numbers,
            )  # fmt: skip
            state["step"] += ~stopped
            p.grad = None
