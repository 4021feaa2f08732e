"""Ablations: many variants of a recipe trained from one cache, and the table of what came of them."""
