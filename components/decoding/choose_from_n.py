"""Option decode=choose_from_n: the model is shown its own samples and names the best one."""

from __future__ import annotations

from components.decoding.selection import Selection


class ChooseFromN(Selection):
    """The rival of aggregation in arXiv 2503.04104: the same candidates, judged instead of used. See `Selection`."""
