"""Plugins: packages that add formats, passes or lowerings to qjax without editing it.

A package names a module or a function under the entry-point group ``qjax.plugins``; importing the module, or calling
the function without arguments, registers what it brings:

    [project.entry-points."qjax.plugins"]
    ternary = "my_package.ternary"              # a module whose import registers a format
    my_kernels = "my_package.kernels:register"  # a function

They are loaded once, the first time a name is looked up that qjax itself does not know.
"""

from __future__ import annotations

import importlib.metadata
import threading

from qjax.errors import warn

GROUP = "qjax.plugins"

_lock = threading.RLock()
_loaded: list[str] | None = None


def load() -> list[str]:
    """Load every installed plugin once and return the names of those that loaded.

    A plugin that fails is reported by a `QjaxWarning` that names it, and the others are loaded all the same: a
    broken third package must not stop a model from being read.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = []  # set first: a plugin that looks something up while it loads must not start over
            for entry in importlib.metadata.entry_points(group=GROUP):
                try:
                    plugin = entry.load()
                    if callable(plugin):
                        plugin()
                except Exception as error:  # whatever a stranger's module raises
                    warn(f"plugin {entry.name!r} ({entry.value}) was not loaded: {type(error).__name__}: {error}")
                else:
                    _loaded.append(entry.name)
        return list(_loaded)
