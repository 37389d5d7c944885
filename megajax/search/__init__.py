"""Searches: they know genes, fitness and operators, and nothing of networks."""
