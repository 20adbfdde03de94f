"""Explain latents in words, and score the explanations beside controls."""
