"""Saving and loading of quantized models: atomic, verified, and sufficient by themselves."""

from qjax.checkpoint.metadata import read_metadata
from qjax.checkpoint.store import FORMAT_VERSION
from qjax.checkpoint.transfer import load, save

__all__ = ["FORMAT_VERSION", "load", "read_metadata", "save"]
