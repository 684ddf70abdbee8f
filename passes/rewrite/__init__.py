"""Conversions: each file answers what a block becomes, when, and at what cost."""
