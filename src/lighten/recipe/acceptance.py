"""How many tokens a round of speculative decoding gives, and what share of proposals is taken to be accepted before it is measured.

Legend, as in the paper: α share of proposals that are accepted, γ proposals a round.

Source: Leviathan et al. 2022 (arXiv:2211.17192).
"""

from __future__ import annotations

ACCEPTED = (0.6, 0.7, 0.8)
"""α of a draft model, low, middle and high. Source: table 2 of the paper, T5-XXL with three drafts on two tasks: 0.53 to 0.82, most of them within
0.6 to 0.8."""
LOOKUP_ACCEPTED = (0.0, 0.4, 0.8)
"""α of proposals that are copied from the text so far: from none, where it repeats nothing, to the best of the drafts; the middle is no more than
that. Choice: what a text repeats is known when it is measured."""


def expected_tokens(accepted: float, proposed: int) -> float:
    """Tokens that a round gives on average, one of them the model's own.

        (1 - α^(γ+1)) / (1 - α)

    Source: equation 1 of the paper.

    >>> expected_tokens(0.8, 3), expected_tokens(0.0, 5), expected_tokens(1.0, 4)
    (2.952, 1.0, 5.0)
    """
    if accepted == 1:
        return proposed + 1.0
    return round((1 - accepted ** (proposed + 1)) / (1 - accepted), 12)
