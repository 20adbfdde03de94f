"""The plugins that come with saelens_lite. The core finds them only by entry points."""
