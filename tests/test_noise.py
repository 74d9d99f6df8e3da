"""NCE's noise: stores whose log-probs are not those of what drew the negatives are refused."""

from typing import Any

import pytest

from megatron_cpo.training.noise import check_noise, describe_noise

REFERENCE = {"name": "mle", "iteration": "60", "digest": "a" * 64}
DRAWN = {
    "kinds": {"gt": 10, "an": 40},
    "policy": {"backend": "megatron", **REFERENCE, "dtype": "float32"},
    "reference": REFERENCE,
    "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 256},
}


def test_samples_of_the_reference_are_noise() -> None:
    check_noise("data/groups", DRAWN, "nce")
    assert describe_noise(DRAWN) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"kinds": {"gt": 10, "an": 20, "bn": 10, "mn": 10}}, r"negatives of kind bn, mn, whose"),
        ({"kinds": {"gt": 10, "given": 10}}, r"of kind given.*--negatives an=11"),
        ({"policy": {**REFERENCE, "digest": "b" * 64}}, r"drawn from mle \(bbb.*reference is mle"),
        ({"policy": None}, r"drawn from an unknown model.*--score-only"),
    ],
)
def test_what_is_no_noise_is_refused(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^--cpo-objective nce: .*{reason}"):
        check_noise("data/groups", DRAWN | changed, "nce")


def test_a_part_of_the_distribution_is_said() -> None:
    """The paper's top-k 50 is not the whole softmax that the store's log-probs are of."""
    line = describe_noise(DRAWN | {"sampling": {"temperature": 0.7, "top_k": 50, "top_p": 1.0}})
    assert line is not None
    assert "drawn with --temperature 0.7 --top-k 50, the" in line
