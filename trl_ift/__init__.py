"""Alignment methods that TRL lacks, as trainers that feel like TRL's own.

The public names are imported on first use: `import trl_ift` loads neither torch nor transformers.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .registry import METHODS, Method, get_method


try:
    __version__ = version("trl-ift")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

_MODULE_OF = {name: method.module for method in METHODS for name in (method.trainer, method.config)}

__all__ = ["METHODS", "Method", "__version__", "get_method", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'trl_ift' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
