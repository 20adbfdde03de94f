"""Synthetic activations with a known truth, and the measures of a dictionary against it."""
