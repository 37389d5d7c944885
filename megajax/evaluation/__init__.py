"""What networks are worth on data that no search has seen, and how sure one can be.

Knows outputs, labels and statistics; nothing of searches or files.
"""
