"""All searches by name, and the configuration section that chooses among them.

Knows what a space of genes and an evaluation are; nothing of networks, masks or files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from megajax.search import binary, evosax, genetic, gradient, niches, pareto, sampling
from megajax.search.descent import Objective
from megajax.search.genetic import Evaluate, Race, Space, Tools
from megajax.search.loop import Limits, Search
from megajax.search.operators import CROSSOVERS, SELECTIONS, SURVIVALS
from megajax.sections import Section, at_least, between, one_of
from megajax.types import Genes

__all__ = ["METHODS", "EvolutionConfig", "limits_of", "make_search"]


METHODS: dict[str, Callable[[Any, Tools], Search]] = {
    "genetic": genetic.from_config,
    "gradient": gradient.from_config,
    "random": sampling.from_config,
    "niches": niches.from_config,
    "nsga2": pareto.from_config,
    "one_plus_one": binary.one_plus_one,
    "pbil": binary.pbil,
    "cma_es": partial(evosax.from_config, algorithm="CMA_ES"),
    "sep_cma_es": partial(evosax.from_config, algorithm="Sep_CMA_ES"),
    "differential_evolution": partial(evosax.from_config, algorithm="DifferentialEvolution"),
}
"""The searches by the names that the configuration gives them."""


class EvolutionConfig(Section):
    """The search.

    Operators are names, or functions of the same signature (see `megajax.search.operators`).

    Attributes:
        method: a name in `megajax.search.methods.METHODS`; `genetic` is the genetic algorithm.
        population_size: individuals P.
        generations: generations after the first population.
        elites: individuals that a `generational` survival carries over unchanged.
        selection: `tournament`, `roulette` or `rank`, or a function.
        tournament_size: contestants of a tournament.
        crossover: one name or several; each child draws one of them. Or a function. None takes
            `uniform` and `arithmetic`, or `uniform` alone where a gene picks one parent.
        mutation: one name (`gaussian`, `reset`) or several, all applied in turn. Or a function.
            None takes `gaussian`, or `reset` where a gene picks one parent.
        mutation_rate: probability that a gene mutates; None means one gene in a hundred, but at
            least one gene of a child on average.
        mutation_scale: standard deviation of the `gaussian` mutation.
        survival: `plus` (the best of parents and children) or `generational`, or a function.
        generations_per_chunk: generations in one compiled call; between calls the host sees how far
            the search is.
        patience: stop after this many generations without an improvement; None never does.
        time_budget: stop after this many seconds; None never does. What it finds depends on the
            machine's speed.
        learning_rate: for `gradient`: of Adam on the genes; for `pbil`: of the probabilities.
        gradient_examples: size of the mini-batch of a gradient step, which costs three passes of
            it.
        gradient_steps: for `genetic`: gradient steps that each child takes before it is scored
            (memetic evolution); its genes keep what it has learnt.
        offspring: for `niches` and `one_plus_one`: children of a generation; None makes as many as
            the population has members.
        sharing: for `niches`: an example that n members are right on is worth 1 / n^sharing to each
            of them; 0 switches the competition off.
        matchmaker: for `niches`: draw the second parent of a pair from those that are right where
            the first is wrong.
        parents_only: for `niches`: only the parents are scored at first, and children fill the
            other places of the population.
        evaluation_budget: score at most this many networks; None sets no limit. What counts is the
            cost: a network scored on a tenth of the examples is a tenth of a network.
    """

    section = "evolution"
    method: Annotated[str, one_of(METHODS)] = "genetic"
    population_size: Annotated[int, at_least(2)] = 32
    generations: Annotated[int, at_least(0)] = 60
    elites: Annotated[int, at_least(0)] = 1
    selection: Annotated[str, one_of(SELECTIONS)] | Callable[..., Any] = "tournament"
    tournament_size: Annotated[int, at_least(1)] = 3
    crossover: (
        Annotated[str, one_of(CROSSOVERS)]
        | tuple[Annotated[str, one_of(CROSSOVERS)], ...]
        | Callable[..., Any]
        | None
    ) = None
    mutation: (
        Annotated[str, one_of(("gaussian", "reset"))]
        | tuple[Annotated[str, one_of(("gaussian", "reset"))], ...]
        | Callable[..., Any]
        | None
    ) = None
    mutation_rate: Annotated[float, between(0, 1)] | None = None
    mutation_scale: Annotated[float, at_least(0)] = 0.3
    survival: Annotated[str, one_of(SURVIVALS)] | Callable[..., Any] = "plus"
    generations_per_chunk: Annotated[int, at_least(1)] = 1
    patience: Annotated[int, at_least(1)] | None = None
    time_budget: Annotated[float, at_least(0)] | None = None
    learning_rate: Annotated[float, between(1e-9, 1e3)] = 0.1
    gradient_examples: Annotated[int, at_least(1)] = 256
    gradient_steps: Annotated[int, at_least(0)] = 0
    offspring: Annotated[int, at_least(1)] | None = None
    sharing: Annotated[float, at_least(0)] = 1.0
    matchmaker: bool = True
    parents_only: bool = False
    evaluation_budget: Annotated[int, at_least(0)] | None = None

    def _check(self) -> None:
        """Raises ConfigError for values that cannot work together."""
        size = self.population_size
        self.require(size > self.elites, "population_size", f"{self.elites} elites leave no child")
        fits = self.tournament_size <= size
        self.require(fits, "tournament_size", f"it must not exceed the population of {size}")
        for name in ("crossover", "mutation"):
            self.require(getattr(self, name) != (), name, "at least one is needed")
        budget = self.evaluation_budget
        enough = budget is None or budget >= size
        self.require(enough, "evaluation_budget", f"the first population alone needs {size}")


def make_search(
    config: EvolutionConfig,
    space: Space,
    evaluate: Evaluate,
    race: Race | None = None,
    *,
    objective: Objective | None = None,
    improve: Callable[..., Genes] | None = None,
    num_examples: int = 1,
) -> Search:
    """The search that a configuration section describes.

    Args:
        config: the method and its choices.
        space: what is known of the genes.
        evaluate: `evaluate(problem, genes [M, ...]) -> fitness [M]` or `(fitness, aux)`.
        race: how children race, or None.
        objective: for gradients; see `megajax.search.descent`.
        improve: for children that learn; see `megajax.search.genetic.Tools`.
        num_examples: that a full scoring passes through a network.

    Returns:
        The search, equal to others with the same choices.

    Raises:
        ConfigError: the choices do not fit the genes.
    """
    races = race is None or config.method == "genetic"
    config.require(races, "method", "only the genetic algorithm races")
    tools = Tools(space, evaluate, race, objective, improve, num_examples)
    return METHODS[config.method](config, tools)


def limits_of(config: EvolutionConfig, num_examples: int) -> Limits:
    """When a search ends, as a configuration section says."""
    budget = config.evaluation_budget
    return Limits(
        generations=config.generations,
        patience=config.patience,
        seconds=config.time_budget,
        examples=None if budget is None else budget * num_examples,
        per_call=config.generations_per_chunk,
    )
