"""A network's program: traced, walked, and read for what each leaf does in it.

Knows jaxprs; nothing of populations, masks or files.
"""
