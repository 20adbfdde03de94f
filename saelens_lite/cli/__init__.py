"""The command line: the library's nouns as verbs, over the same functions."""

# their commands register with the app
from saelens_lite.cli import evaluation, features, files, hub, interventions, plugins, tour, training  # noqa: F401
from saelens_lite.cli.base import main

__all__ = ["main"]
