"""``qjax recipes``."""

from __future__ import annotations

import argparse

import qjax
from qjax.cli.output import print_json


def run(args: argparse.Namespace) -> None:
    """List the presets."""
    presets = qjax.recipes()
    if args.json:
        print_json({"recipes": [{"name": name, "description": text} for name, text in presets.items()]})
        return
    width = max(map(len, presets))
    for name, text in presets.items():
        print(f"{name.ljust(width)}  {text}")
