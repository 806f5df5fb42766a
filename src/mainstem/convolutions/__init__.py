"""Convolutional residual networks."""

from .wrn import wrn

__all__ = ["wrn"]
