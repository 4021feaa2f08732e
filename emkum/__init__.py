"""emkum: distil self-supervised teachers into small students, from a cache computed once."""

__version__ = "0.2.0"
