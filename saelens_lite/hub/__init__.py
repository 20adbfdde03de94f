"""Dictionaries on the Hugging Face Hub: push them with a card, pull them by folder and revision."""

from saelens_lite.hub.card import write_card
from saelens_lite.hub.client import Address
from saelens_lite.hub.describe import describe
from saelens_lite.hub.download import Fetched, copy_to, fetch, pull
from saelens_lite.hub.upload import Push, PushFile, push

__all__ = ["Address", "Fetched", "Push", "PushFile", "copy_to", "describe", "fetch", "pull", "push", "write_card"]
