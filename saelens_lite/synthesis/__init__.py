"""Measure dictionaries where the truth is known: synthetic activations of planted features.

```python
planted = sl.synthetic(n_features=1024, d_in=64, seed=0)
truth = planted.sample(8192)  # truth.x [n d_in], truth.codes (sparse), truth.active [n n_features]

configs = [sl.TrainConfig(sparsity=rule, options={"k": 8}, d_sae=256, n_tokens=300_000) for rule in ("topk", "batch_topk")]
trained = sl.train(planted, configs)
result = planted.measure(trained[0].dictionary, n=10_000, controls=True)
print(result)  # MCC, uniqueness, precision, recall, F1, explained variance, … beside three controls
result["f1"], result.controls["linear"]["f1"]
```

An activation is x = bias + Σ_i code_i · direction_i + noise. Every batch is new and drawn when it is needed. To resume a run,
give the source again: `sl.resume("runs", sl.synthetic(…))`. Other settings are refused.

**Settings.** The defaults are those of SynthSAEBench-16k (Chanin and Garriga-Alonso 2026, arXiv:2602.14687), except for the
sizes: `sl.synthetic(16_384, 768)` has its size. The published model has other random directions and causes.

- Firing probabilities fall by Zipf's law from `p_max` to `p_min`. With `l0`, they are scaled so that they add up to it.
- Trees: `roots` features have `branching` children each, over `depth` generations. A child fires only with its parent,
  and at most one child of a parent fires (`exclusive`). `roots=0`: no hierarchy.
- Features fire together: `rank` common causes with weights of deviation `correlation` (a Gaussian copula).
- Superposition: unit directions that overlap as little as they can on average, or `directions="random"`. `coherence` is the
  largest |cos| of each with another.
- A code is normal with the mean `magnitude` and the deviation `magnitude_std` of its feature. That of a child is multiplied by
  the code of its parent over its mean (`scale_children`).

**Exact probabilities.** Roots and features outside trees fire with exactly the probabilities of Zipf's law, with common causes
too, but for codes that would not be positive (about 1 in 10⁴), which are left out. Those of children are raised for what the
hierarchy takes from them (`compensate`), but many are too large for their parent, as in the benchmark. With the defaults,
children together fire 0.46 times as often as is aimed at for 1,024 features, 0.47 for 16,384; then the true L0 is 7.3 instead
of 13.1, and 34 instead of 59. `planted.true_l0` and each report state it. More roots lower the difference: with `roots=128`,
the children of 1,024 features fire as often as is aimed at.

**Measures.** `saelens_lite.synthesis.measure` has their definitions, which are those of the benchmark. MCC pairs latents and
features one to one by |cos|; precision, recall and F1 take each latent as a detector of the feature nearest to it. Intervals
are bootstrapped over activations. They say nothing about other seeds: train several.

**Controls.** `oracle` has the most frequent features with their true codes, `linear` the best linear filters and thresholds
for known directions, `random` random directions. A better explained variance than that of the oracle is no sign of true
features: a dictionary with few latents gains by mixing those that it has no latent for.

`scripts/comparisons/synthetic_table.py` measures all rules at three levels of sparsity, and SAELens beside them.
"""

from saelens_lite.synthesis.benchmark import Synthetic, synthetic
from saelens_lite.synthesis.report import SyntheticReport
from saelens_lite.synthesis.settings import SyntheticConfig
from saelens_lite.synthesis.source import Truth

__all__ = ["Synthetic", "SyntheticConfig", "SyntheticReport", "Truth", "synthetic"]
