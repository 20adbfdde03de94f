"""The loggers that come with saelens_lite. Each imports its tool on first use."""
