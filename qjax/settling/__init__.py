"""Settling a recipe: searches that decide formats and scales site by site, unit after unit, resumable."""

from qjax.settling.run import Settled, settle

__all__ = ["Settled", "settle"]
