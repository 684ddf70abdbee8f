"""What selectors do: a file per method; `frame` runs one over the rows of a call."""
