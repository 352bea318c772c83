"""What is trained: one file per idea, each binding pure functions into one Method."""

from diffdistill.methods.base import Method

__all__ = ["Method"]
