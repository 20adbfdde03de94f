"""Readers and writers of other tools' files, one format per module."""
