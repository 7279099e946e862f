"""Measure, predict, draw and train: what looks at the methods from above."""
