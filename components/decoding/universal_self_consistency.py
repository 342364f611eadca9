"""Option decode=universal_self_consistency: the model names the sample that most agree with (Chen et al. 2023, arXiv 2311.17311)."""

from __future__ import annotations

from components.decoding.selection import Selection


class UniversalSelfConsistency(Selection):
    """A vote without an extractor, so also for free text. See `Selection`."""
