"""The loggers that come with saelens_lite; each imports its tool when it is asked for."""
