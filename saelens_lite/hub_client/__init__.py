"""Guarded requests to the Hugging Face Hub: addresses, commits, listings of files, and typed errors.

Nothing here depends on dictionaries. So `saelens_lite.model` uses it for language models, and `saelens_lite.hub` for
dictionaries.
"""
