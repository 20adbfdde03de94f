"""Feature stores written for other tools; one tool a module."""
