"""Bridges to independent judges: other projects' evaluations, run by their own code on our dictionaries and models."""

from saelens_lite.adapters.dense_sae import DenseSAE, DenseSAEConfig, sae_bench
from saelens_lite.adapters.probing import SparseProbe, SparseProbeReport, sae_probes

__all__ = ["DenseSAE", "DenseSAEConfig", "SparseProbe", "SparseProbeReport", "sae_bench", "sae_probes"]
