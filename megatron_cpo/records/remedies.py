"""What to do where no record is usable: what fits the reason for which most were left out."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

SETS = "prompt+completion, prompt+chosen, chosen+rejected, instruction+response, messages or text"
FROM_TEXT = "jq -R '{text: .}' FILE"
FROM_CSV = (
    "python3 -c 'import csv, json, sys; [print(json.dumps(row)) for row in "
    "csv.DictReader(sys.stdin)]' < FILE"
)
_REMEDIES = (
    (r"name it prompt$", "name that field with --prompt-field"),
    (
        r"without a prompt|no prompt$|^no answer behind",
        "give the prompt in a field of its own, and what follows it in chosen and rejected",
    ),
    (r"^chosen and rejected differ", "give pairs of which nothing but the last answer differs"),
    (
        r"^no .*prompt|^missing field",
        f"a record needs {SETS}, and what --prompt-template names; name other fields with "
        "--prompt-field, --completion-field and their like",
    ),
    (r"longer than \d+ tokens", "raise --max-length, or give shorter records"),
    (
        r"^fewer than \d+ rejected|^no chosen and rejected",
        "give each record its rejected answers, name their field with --rejected-field, or ask for "
        "other --negatives than given",
    ),
    (r"^field 'rejected'", "give text there, or name another field with --rejected-field"),
    (r"tokens to split", "give texts of at least two tokens"),
    (r"not UTF-8", "write the file anew as UTF-8, by iconv -t UTF-8"),
    (r"^no field", "name the fields that the data has"),
    (
        r"^not JSON",
        f"each line must be a JSON object with {SETS}; {FROM_TEXT} makes them of lines of plain "
        f"text, {FROM_CSV} of CSV with a header",
    ),
    (r"^not a JSON|MiB$", f"each line must be a JSON object with {SETS}"),
    (r"^earlier turns", "give chats as messages"),
    (r"needs? a chat template", "use a tokenizer that has one, or give it one by --chat-template"),
    (
        r"^the chat template",
        "give messages that this one takes, or another one by --chat-template",
    ),
    (r"part that is no text", "leave such messages out: nothing but text is read"),
    (r"messages|assistant", "a chat is a list of {role, content} with an assistant's turn"),
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
    about_fields = re.match(r"no field|missing|no prompt|field .* is (not|neither)", reason)
    has = f" (the first has {', '.join(names) or 'none'})" if about_fields else ""
    return found + has
