"""Guarded requests to the Hugging Face Hub: addresses, commits, listings of files, and typed errors.

Nothing here knows what a dictionary is, so language models (`saelens_lite.model`) and dictionaries (`saelens_lite.hub`) both
stand on it.
"""
