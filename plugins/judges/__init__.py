"""Other projects' evaluations, run by their own code on our dictionaries and models; one project a module."""
