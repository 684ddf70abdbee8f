"""Find attention blocks in a normalised graph (see `sites.find`)."""
