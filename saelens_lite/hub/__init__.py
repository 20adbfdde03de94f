"""Dictionaries on the Hugging Face Hub: pushed with a card, pulled by folder and revision."""

from saelens_lite.hub.card import write_card
from saelens_lite.hub.describe import describe
from saelens_lite.hub.download import Fetched, copy_to, fetch, pull
from saelens_lite.hub.upload import Push, PushFile, push
from saelens_lite.hub_client.client import Address

__all__ = ["Address", "Fetched", "Push", "PushFile", "copy_to", "describe", "fetch", "pull", "push", "write_card"]
