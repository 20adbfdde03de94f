"""The repositories of the Hub that carry a tag."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from saelens_lite.hub_client.client import NAME, client, typed_errors
from saelens_lite.hub_client.guard import Guard

MOST_REPOSITORIES = 1000  # per tag
MAX_TAGS, MAX_CHARACTERS = 200, 200  # per repository and per tag


class TaggedRepository(NamedTuple):
    """A repository and its tags, as its owner wrote them."""

    repo: str
    tags: tuple[str, ...]

    def fact(self, kind: str) -> str | None:
        """Return the value of a tag such as license:mit, or None if the repository has no such tag."""
        return next((tag.removeprefix(f"{kind}:") for tag in self.tags if tag.startswith(f"{kind}:")), None)


def tagged_repositories(tags: Iterable[str]) -> list[TaggedRepository]:
    """Return the repositories that carry one of the tags, the most downloaded of each tag first.

    Raises:
        HubError: the Hub cannot be reached, or its answer cannot be read.
    """
    repositories: dict[str, TaggedRepository] = {}
    for tag in tags:
        about = f"repositories tagged {tag}"
        hub = client(Guard(about))
        with typed_errors(about):
            for model in hub.list_models(filter=tag, sort="downloads", limit=MOST_REPOSITORIES):
                if re.fullmatch(rf"{NAME}/{NAME}", model.id):
                    repositories[model.id] = TaggedRepository(model.id, _texts(model.tags))
    return list(repositories.values())


def _texts(tags: object) -> tuple[str, ...]:
    """Return the tags that are short texts without control characters."""
    listed = tags if isinstance(tags, list) else []
    return tuple(tag for tag in listed[:MAX_TAGS] if isinstance(tag, str) and len(tag) <= MAX_CHARACTERS and tag.isprintable())
