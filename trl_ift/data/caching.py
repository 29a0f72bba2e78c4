"""Functions for `Dataset.map` and `filter` whose cached results do not outlive a change of their code."""

import hashlib
import inspect
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any


def versioned(function: Callable, *called: Callable) -> Callable:
    """Return `function` under a fingerprint that changes with the source of its module, and of those of `called`.

    `datasets` hashes a function that can be imported by its name alone: after an upgrade of the library it would find, and
    use, what the old code has made. `called` are functions of other modules that `function` calls or is given.
    """
    return partial(_call, function, source_digest(function, *called))


def source_digest(*functions: Callable) -> str:
    """Hex digits that change with the source of the modules of these functions (or of the classes of callable objects)."""
    return "-".join(_source_digest(_module_of(function)) for function in functions)


def _module_of(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__module__", None) or type(function).__module__


@cache
def _source_digest(module: str) -> str:
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        # Of a notebook or a prompt, whose functions `datasets` hashes by their code
        return "0" * 16
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _call(function: Callable, digest: str, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
