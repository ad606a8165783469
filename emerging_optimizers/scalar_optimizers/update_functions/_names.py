"""Errors of update functions in the terms of their keyword-only forms."""

import re
from collections.abc import Mapping

from ..._rule import GroupKey


def in_own_terms(error: Exception, renamed: Mapping[str, GroupKey]) -> Exception:
    """Return an error that names the caller's arguments instead of the rule's hyperparameters.

    Args:
        error: A TypeError or ValueError.
        renamed: Where the arguments have a hyperparameter, if not under its name.
    """
    kind = TypeError if isinstance(error, TypeError) else ValueError
    names = {
        name: key if isinstance(key, str) else f"{key[0]}[{key[1]}]"
        for name, key in renamed.items()
    }
    pattern = rf"\b({'|'.join(names)})\b"
    return kind(re.sub(pattern, lambda found: names[found[0]], str(error)))
