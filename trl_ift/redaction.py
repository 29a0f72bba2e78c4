"""Access tokens, keys and passwords, kept out of everything that is written or printed.

`redacted` is applied where settings are written (`study.json`, `self_play.json`, reports, trackers) and messages are printed.
"""

import re
from collections.abc import Mapping
from typing import Any


# Tokens of the Hub, and keys of servers that speak OpenAI's interface: neither `hf_llama_finetune` nor `sk-learn-embeddings`
TOKEN = re.compile(r"\b(hf_(?=[A-Za-z0-9]{30})|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z]))[A-Za-z0-9_-]{16,}")
# In an address: user and password, but no user alone, which may be a container (`abfs://train@account`)
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s@:]*:[^/?#\s]*@")
_QUERY = re.compile(
    r"([?&](?:[\w-]*(?:token|signature|secret|password|credential|api[_-]?key)|sig)=)[^&#\s'\"]+", re.I
)
# Names of options whose value is a secret, whatever it looks like; not `eos_token`, `max_tokens`
_SECRET = re.compile(
    r"(?:[\w-]+[_-])?(?:api[_-]?key|passw(?:or)?d|secret|authorization|(?:secret|private|access)[_-]key)"
    r"|(?:(?:hub|hf|auth|use_auth|access|push_to_hub|judge|wandb|refresh|bearer|api|id|session|security)[_-]?|[\w-]+_auth_)?token",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\$\{?\w+\}?")  # of the environment: a name, not its value


def redacted(value: Any, name: str = "") -> Any:
    """Return a text, or settings, without tokens, keys and passwords: `***` stands for each.

    Args:
        value: A text; or mappings, lists and tuples of texts, of which a copy is returned. Other values are left as they are.
        name: Name of the option that has the value.
    """
    if isinstance(value, Mapping):
        return {key: redacted(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [redacted(part, name) for part in value]
        return tuple(parts) if type(value) is tuple else parts
    if not isinstance(value, str):
        return value
    if value and _SECRET.fullmatch(name) and not _VARIABLE.fullmatch(value):
        return "***"
    return _QUERY.sub(r"\1***", _CREDENTIALS.sub("***@", TOKEN.sub(r"\1***", value)))
