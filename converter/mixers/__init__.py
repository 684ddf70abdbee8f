"""Mixers: attention blocks in our own terms. Each file is one family."""
