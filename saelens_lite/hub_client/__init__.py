"""Guarded requests to the Hugging Face Hub: addresses, commits, listings of files, and typed errors.

Nothing here depends on dictionaries, so `saelens_lite.model` can use it for language models, and `saelens_lite.hub` for
dictionaries.
"""
