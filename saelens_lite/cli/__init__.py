"""The command line: the library's nouns as verbs, over the same functions."""

# their commands register with the app
from saelens_lite.cli import demo, evaluation, features, files, hub, interventions, plugins, training  # noqa: F401
from saelens_lite.cli.base import main

__all__ = ["main"]
