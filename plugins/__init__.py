"""The plugins that come with saelens_lite; the core knows them by entry points only."""
