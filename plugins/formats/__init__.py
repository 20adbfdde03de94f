"""Other tools' files, read and written; one format a module."""
