"""What each head may see: patterns of sparse attention, and how they become block layouts."""
