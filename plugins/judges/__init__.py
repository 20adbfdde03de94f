"""Judges, which run other projects' evaluations on our dictionaries and models; one module for each project."""
