"""The places where a training step makes the host wait for a GPU, counted on a pretended one."""

import pytest
import torch
from benchmarks.waits import DEVICE, RULES, count_step, pretended_cuda

from saelens_lite.codes import gpu

pytestmark = pytest.mark.pretended_gpu

MOST = {  # waits of a step in which half of the latents are dead
    "topk": 0,
    "batch_topk": 0,
    "group_max": 0,
    "matryoshka": 1,
    "l1": 1,
    "gated": 1,
    "jumprelu": 1,
    "p_anneal": 1,
    "matching_pursuit": 2,
}
WORK = {  # what a GPU does, and the number of waits that torch.cuda.set_sync_debug_mode reports for it
    "a product": (lambda x: (x @ x.T).relu(), 0),
    "numbers made there": (lambda x: torch.zeros(3, device=x.device) + torch.arange(3, device=x.device), 0),
    "a sort": (lambda x: x.sort(1).values.cumsum(0).gather(1, x.argsort(1)), 0),
    "an index": (lambda x: x[torch.arange(2, device=x.device)], 0),
    "a choice": (lambda x: torch.where(x > 0, x, 0.0), 0),
    "item": (lambda x: x.sum().item(), 1),
    "a condition": (lambda x: 1 if (x > 0).any() else 2, 1),
    "float": (lambda x: float(x.amax()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "a mask": (lambda x: x[x > 0], 1),
    "masked_select": (lambda x: x.masked_select(x > 0), 1),
    "bincount": (lambda x: torch.bincount(torch.arange(3, device=x.device), minlength=9), 2),
    "unique": (lambda x: x.unique(), 1),
    "repeats": (lambda x: torch.repeat_interleave(torch.arange(3, device=x.device)), 1),
    "repeats of a known number": (lambda x: torch.repeat_interleave(torch.arange(3, device=x.device), output_size=3), 0),
    "equal": (lambda x: torch.equal(x, x + 1), 1),
    "to the host": (lambda x: x.cpu(), 1),
    "queued to the host": (lambda x: x.to("cpu", non_blocking=True), 0),
    "on the host": (lambda x: torch.tensor([1.0, 2.0]).sum().item(), 0),
    "read on the host": (lambda x: x.cpu().tolist(), 1),
    "from the host": (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
    "queued from the host": (lambda x: torch.ones(2).pin_memory().to(x.device, non_blocking=True), 0),
    "a backward pass": (lambda x: (x.clone().requires_grad_() ** 2).sum().backward(), 0),
}


@pytest.mark.parametrize("work", WORK)
def test_waits_are_noticed(work):
    run, n_waits = WORK[work]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with pretended_cuda() as counts:
        assert x.device == DEVICE
        run(x)
    assert counts.waits.total() == n_waits


def test_views_are_no_launches():
    x = torch.zeros(3, 4)
    with pretended_cuda() as counts:
        x.T.reshape(-1).unsqueeze(0)[:, 1:].detach()  # the reshape of a transpose copies
        torch.empty(3, device=DEVICE)
    assert dict(counts.launches) == {"clone": 1}


def test_the_pretence_ends_with_the_block():
    with pretended_cuda():
        assert gpu.available(torch.zeros(2, device=DEVICE))
    assert not gpu.available(torch.zeros(2))
    assert not torch.cuda.is_available()


def test_all_rules_are_counted():
    from saelens_lite import registry

    own = {plugin.name for plugin in registry.plugins() if plugin.distribution == registry.OWN_DISTRIBUTION}
    assert set(MOST) == set(RULES) == own


@pytest.mark.slow
@pytest.mark.parametrize("rule", MOST)
def test_a_step_waits_no_more_often(rule):
    counts = count_step(rule, dead=0.5)
    assert counts.launches.total() > 20
    assert counts.waits.total() <= MOST[rule], "\n".join(f"{n} × {where}: {why}" for (where, why), n in counts.waits.items())
