"""What models are compared in: names, and what is best. No models and no numbers, for --help."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """Something that a model can be better or worse in."""

    name: str
    label: str
    best: str
    """What is best: `highest`, `lowest` or `nearest to 0`."""

    def badness(self, value: float) -> float:
        """Lower is better."""
        return {"highest": -value, "lowest": value, "nearest to 0": abs(value)}[self.best]


QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity("win_rate", "win rate", "highest"),
        Quantity("nll_distance", "distance of the external NLL to the truth's", "lowest"),
        Quantity("seq_rep_4", "seq-rep-4 minus the truth's", "nearest to 0"),
    )
}
"""In the order in which one is taken by default, if it is there."""
