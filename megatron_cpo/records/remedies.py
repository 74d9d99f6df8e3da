"""What to do where no record is usable: what fits the reason for which most were left out."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

SETS = "prompt+completion, prompt+chosen, chosen+rejected, instruction+response, messages or text"
_REMEDIES = (
    (
        r"^no .*prompt|^missing field",
        f"a record needs {SETS}; name other fields with --prompt-field, --completion-field and "
        "their like",
    ),
    (r"longer than \d+ tokens", "raise --max-length, or give shorter records"),
    (
        r"rejected",
        "give each record its rejected answers, name their field with --rejected-field, or ask for "
        "other --negatives than given",
    ),
    (r"tokens to split", "give texts of at least two tokens"),
    (r"not UTF-8", "write the file anew as UTF-8, by iconv -t UTF-8"),
    (r"^no field", "name the fields that the data has"),
    (r"^not JSON|^not a JSON|MiB$", f"each line must be a JSON object with {SETS}"),
    (r"messages|assistant|chat", "a chat is a list of {role, content} with an assistant's turn"),
    (r"is not a string", "give text there, or name another field with --prompt-field and its like"),
)
"""What a reason has in it, and what to do; the first that fits."""


def field_names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a record as they are shown to who looks for the right ones."""
    return tuple(
        f"{name}, a list of objects: jq -c '.{name}[]' writes it as JSON Lines"
        if isinstance(value, list) and value and isinstance(value[0], dict)
        else name
        for name, value in fields.items()
    )


def remedy(counts: Mapping[str, int], names: Sequence[str]) -> str:
    """What to do about the most frequent reason.

    Args:
        counts: records left out by reason.
        names: `field_names` of the first record.
    """
    if not counts:
        return "give data: there is no record in it"
    reason = max(counts, key=lambda why: counts[why])
    found = next((what for sign, what in _REMEDIES if re.search(sign, reason)), "see the first")
    about_fields = re.match(r"no field|missing|no .*prompt|field", reason)
    has = f" (the first has {', '.join(names) or 'none'})" if about_fields else ""
    return found + has
