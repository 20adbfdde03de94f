"""Explainers that come with saelens_lite."""
