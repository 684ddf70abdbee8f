"""FX passes: normalise a captured graph, find attention in it, rewrite what was found."""
