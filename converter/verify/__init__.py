"""Measure and judge a converted model: parity, quality, recall, yardsticks and gates."""
