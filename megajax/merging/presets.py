"""Sections for `merge` that have a name: another library's published choices.

Each is a function that returns keyword arguments of `megajax.merge`.
"""

from __future__ import annotations

from typing import Any

from megajax.alignment import AlignConfig
from megajax.merging.genome import GenomeConfig
from megajax.merging.problem import FitnessConfig, RecalibrateConfig
from megajax.search.methods import EvolutionConfig

__all__ = ["m2n2"]


def m2n2(generations: int = 50_000) -> dict[str, Any]:
    """M2N2 as published for trained parents: niches, a matchmaker, split points; whole networks.

    What its public code does, and `merge` with these sections:

    - The individual is the whole network, all weights in one row. An archive of 20 starts with the
      parents alone, as they are.
    - One child at a time: its first parent is drawn in proportion to the shared fitness (an example
      that n members are right on is worth 1 / n to each of them), the second in proportion to what
      it has where the first is wrong.
    - The row is cut anywhere; before the cut the child lies at a random point of the arc between
      the two parents, behind it at the opposite point. No mutation.
    - The child takes the place of the member with the least shared fitness, itself included.

    The result is the most accurate network seen, M2N2's the most accurate one left in the archive.
    Where nobody is right where the first parent is wrong, the second is drawn by shared fitness
    (in the public code the probabilities are then no numbers).

    Args:
        generations: children made, 50,000 in the public code.

    Example:
        >>> sections = m2n2(generations=4_000)
        >>> sections["evolution"].method, sections["genome"].kind
        ('niches', 'weights')

    Source: Abrantes, Lange and Tang, "Competition and attraction improve model fusion", GECCO 2025,
    arXiv 2508.16204, and its public code, of which none is used here.
    """
    return {
        "align": AlignConfig(method="none"),
        "recalibrate": RecalibrateConfig(enabled=False),
        "genome": GenomeConfig(kind="weights", clip_variances=False),
        "fitness": FitnessConfig(metric="accuracy", combine="raw"),
        "evolution": EvolutionConfig(
            method="niches",
            population_size=20,
            generations=generations,
            offspring=1,
            mutation_rate=0.0,
            parents_only=True,
            generations_per_chunk=min(max(generations, 1), 1_000),
        ),
    }
