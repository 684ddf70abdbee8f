"""`to: mean-gqa` for reattend: grouped-query attention by averaging key/value heads."""
