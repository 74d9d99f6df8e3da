"""NCE's noise: whether the log-probs in a store are those of what drew its negatives.

NCE contrasts y_1 with samples of a noise p_N whose log-probs it knows for all K candidates. A
store holds one log-prob per candidate, log pi_ref, summed over its tokens with the end, from the
whole softmax. That is log p_N for `an`, drawn from the reference at temperature 1 from all tokens,
and for nothing else: a batch negative is a draw from the data, `tn`, `mn` and `pss` are made of
y_1, and nobody knows what `given` answers were drawn from.
"""

from typing import Any

from megatron_cpo.checkpoints.identity import same_checkpoint, short_digest

_OF_THE_REFERENCE = ("gt", "an")
_WHOLE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def check_noise(path: str, manifest: dict[str, Any], objective: str) -> None:
    """Refuse a store whose reference is not the noise of its negatives.

    Args:
        path: PREFIX of the store, for the message.
        manifest: its own, scored.

    Raises:
        ValueError: a kind other than `an`, or drawn from another model than the reference.
    """
    others = [kind for kind in manifest["kinds"] if kind not in _OF_THE_REFERENCE]
    if others:
        raise ValueError(
            f"--cpo-objective {objective}: {path} has negatives of kind {', '.join(others)}, whose "
            "probability under what drew them is not in the store; build one with --negatives "
            "an=11, or use --cpo-objective best"
        )
    policy, reference = manifest.get("policy"), manifest["reference"]
    if policy is None or not same_checkpoint(policy, reference):
        drew = f"{policy['name']} ({short_digest(policy)})" if policy else "an unknown model"
        raise ValueError(
            f"--cpo-objective {objective}: the negatives of {path} were drawn from {drew}, its "
            f"reference is {reference['name']} ({short_digest(reference)}), so its log-probs are "
            "not the noise's; score it under what drew it with megatron-cpo build --score-only, "
            "or use --cpo-objective best"
        )


def describe_noise(manifest: dict[str, Any]) -> str | None:
    """The log line where negatives were drawn from a part of the distribution; else None.

    Their log-probs under the noise are then higher than those in the store, and y_1's may be -inf.
    """
    sampling = manifest.get("sampling") or {}
    cut = [
        f"--{name.replace('_', '-')} {sampling[name]}"
        for name, whole in _WHOLE.items()
        if sampling.get(name, whole) != whole
    ]
    if not cut:
        return None
    return (
        f"megatron_cpo: NCE's noise: the negatives were drawn with {' '.join(cut)}, the log-probs "
        "are of the reference's whole distribution: an approximation; exact are negatives built "
        "with --top-k 0 --top-p 1 --temperature 1"
    )
