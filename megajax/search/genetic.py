"""The genetic algorithm: select, cross, mutate, repair, score, survive.

Knows genes, fitness and operators; nothing of networks, masks or files.

Example:
    >>> from megajax.search.loop import Limits, run
    >>> def evaluate(target, genes):
    ...     return -jnp.sum((genes - target) ** 2, axis=-1)
    >>> search = GeneticAlgorithm(evaluate, num_offspring=64)
    >>> key, genes = jax.random.key(0), jax.random.uniform(jax.random.key(1), (64, 5))
    >>> target = jnp.float32(0.3)
    >>> state, _ = run(key, search, search.init(key, genes, target), target, Limits(100))
    >>> bool(jnp.abs(state.best.genes - 0.3).max() < 0.05)
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from megajax.errors import ConfigError, first_line
from megajax.search import operators
from megajax.search.descent import Objective, descent_of
from megajax.search.loop import Counts, Record, State, scored, start
from megajax.search.operators import (
    BLENDING,
    CROSSOVERS,
    SELECTIONS,
    SURVIVALS,
    Crossover,
    Mutation,
    Population,
    Selection,
    Survival,
)
from megajax.trees import told
from megajax.types import Genes, Key, Method, PyTree, bind

__all__ = [
    "GeneticAlgorithm",
    "Race",
    "Space",
    "Tools",
    "check_operators",
    "evaluated",
    "from_config",
]

Evaluate: TypeAlias = Callable[[PyTree, Genes], Any]
"""`evaluate(problem, genes [M, ...])` is the fitness `[M]`, or that and aux, leaves `[M, ...]`."""


class Space(Protocol):
    """What a search knows of its genes; `megajax.merging.genome.Genome` adds what networks are.

    Attributes:
        gene_ndim: trailing axes of one gene, for the operators; None if a gene is a whole leaf.
        num_genes: genes of an individual.
        picks: whether a gene picks one parent, so that genes cannot be blended.
    """

    @property
    def gene_ndim(self) -> int | None: ...  # noqa: D102
    @property
    def num_genes(self) -> int: ...  # noqa: D102
    @property
    def picks(self) -> bool: ...  # noqa: D102

    def init(self, key: Key, size: int, parents: PyTree) -> Genes:
        """The first population, leaves `[size, ...]`; the parents come first."""

    def repair(self, genes: Genes) -> Genes:
        """Puts what variation made back into the search space."""

    def sample(self, key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Random genes, for the reset mutation."""

    def noise(self, key: Key, genes: Genes, *, rate: float, scale: float) -> Genes:
        """The Gaussian mutation."""


class Tools(NamedTuple):
    """What a problem gives a search to work with.

    Attributes:
        space: what is known of the genes.
        evaluate: `evaluate(problem, genes [M, ...]) -> fitness [M]` or `(fitness, aux)`.
        race: how children race, or None.
        objective: of one individual on a mini-batch, see `megajax.search.gradient`; or None.
        improve: `improve(key, problem, genes [M, ...], descent=...)` takes the steps of a descent
            with every individual; or None.
        num_examples: that a full scoring passes through a network.
    """

    space: Any
    evaluate: Evaluate
    race: Race | None = None
    objective: Objective | None = None
    improve: Callable[..., Genes] | None = None
    num_examples: int = 1


@dataclass(frozen=True)
class Race:
    """Children are scored on a sample of the examples first, and only the best of them on all.

    Attributes:
        sample: `sample(key, problem) -> problem` with fewer examples.
        examples: how many.
        share: of the children that are scored on all examples, rounded up.

    Example:
        >>> Race(lambda key, problem: problem, 64, 0.1).finalists(30)
        3
    """

    sample: Callable[[Key, PyTree], PyTree]
    examples: int
    share: float = 0.125

    def finalists(self, num_offspring: int) -> int:
        """How many of the children are scored on all examples."""
        return max(math.ceil(self.share * num_offspring - 1e-9), 1)


@dataclass(frozen=True)
class GeneticAlgorithm:
    """A genetic algorithm, composed of its operators.

    A generation: select two parents for each child, cross, mutate, repair, score the children (and
    nobody else), and let survivors be chosen. Fitness that is not finite counts as -inf.

    Attributes:
        evaluate: `evaluate(problem, genes [M, ...]) -> fitness [M]` or `(fitness, aux)`, maximised.
        num_offspring: children M of a generation. With `generational` survival and a population of
            P, there are P - M elites.
        select: see `megajax.search.operators`, like the three below.
        cross: crossover.
        mutate: mutation.
        survive: survival.
        repair: puts genes back into the search space.
        race: how children race; None scores all of them on all examples.
        improve: `improve(key, problem, genes) -> genes` of children before they are scored, which
            inherit what they learn (Lamarck); None leaves them as they are.
        improve_cost: passes of an example through a network that this takes for each child.
    """

    evaluate: Evaluate
    num_offspring: int
    select: Selection = operators.tournament
    cross: Crossover = operators.uniform
    mutate: Mutation = operators.gaussian
    survive: Survival = operators.plus
    repair: Callable[[Genes], Genes] = operators.unchanged
    race: Race | None = None
    improve: Callable[[Key, PyTree, Genes], Genes] | None = None
    improve_cost: int = 0

    def init(self, key: Key, genes: Genes, problem: PyTree) -> State:
        """Scores the first population.

        Args:
            key: not used: the population is given.
            genes: leaves `[P, ...]`.
            problem: what the evaluation takes beside the genes.
        """
        del key
        return start(evaluated(self.evaluate, problem, genes))

    def step(self, key: Key, state: State, problem: PyTree) -> tuple[State, Record]:
        """Makes one generation.

        Args:
            key: PRNG key of the generation.
            state: after the one before.
            problem: what the evaluation takes beside the genes.
        """
        select_key, cross_key, mutate_key, survive_key, score_key = jax.random.split(key, 5)
        population = state.population
        pairs = self.select(select_key, population.fitness, 2 * self.num_offspring)
        first, second = (operators.take(population.genes, half) for half in jnp.split(pairs, 2))
        genes = self.repair(self.mutate(mutate_key, self.cross(cross_key, first, second)))
        full, size = self.num_offspring, self.num_offspring
        if self.race is None:
            if self.improve is not None:
                genes = self.improve(score_key, problem, genes)
            offspring = evaluated(self.evaluate, problem, genes)
        else:
            offspring = self._raced(self.race, score_key, problem, genes)
            full = self.race.finalists(size)
        counts = Counts(*map(jnp.int32, (size, full, size if self.partial_examples else 0)))
        survivors = self.survive(survive_key, population, offspring)
        return scored(state, survivors, offspring, counts=counts)

    @property
    def partial_examples(self) -> int:
        """Passes that a child takes beside its full scoring: a race's sample, or its learning."""
        return self.improve_cost if self.race is None else self.race.examples

    def cost(self, num_examples: int) -> int:
        """Passes of an example through a network that a generation takes."""
        full = self.num_offspring if self.race is None else self.race.finalists(self.num_offspring)
        return self.num_offspring * self.partial_examples + full * num_examples

    def _raced(self, race: Race, key: Key, problem: PyTree, genes: Genes) -> Population:
        """All children on a sample, the best on all examples; -inf for those that are out."""
        rough = evaluated(self.evaluate, race.sample(key, problem), genes).fitness
        first = jnp.argsort(-rough, stable=True)[: race.finalists(self.num_offspring)]
        best = evaluated(self.evaluate, problem, operators.take(genes, first))

        def spread(leaf: jax.Array, fill: float) -> jax.Array:
            whole = jnp.full((self.num_offspring, *leaf.shape[1:]), fill, leaf.dtype)
            return whole.at[first].set(leaf)

        return Population(
            genes,
            spread(best.fitness, -jnp.inf),
            jax.tree.map(lambda leaf: spread(leaf, 0), best.aux),
        )


def evaluated(evaluate: Evaluate, problem: PyTree, genes: Genes) -> Population:
    """Individuals with their fitness; what is not a finite number counts as -inf.

    Example:
        >>> evaluated(lambda _, genes: genes, None, jnp.array([1.0, jnp.nan])).fitness.tolist()
        [1.0, -inf]
    """
    result = evaluate(problem, genes)
    fitness, aux = result if isinstance(result, tuple) else (result, ())
    return Population(genes, jnp.where(jnp.isfinite(fitness), fitness, -jnp.inf), aux)


def check_operators(search: Any, genes: Genes) -> None:
    """Checks what operators of the user's own return, before anything runs.

    Args:
        search: a genetic algorithm, or another search with some of its operators.
        genes: of the first population, or their shapes and dtypes.

    Raises:
        ConfigError: names the operator, what it gave and what was expected.
    """
    if not hasattr(search, "mutate"):
        return
    size, children = jax.tree.leaves(genes)[0].shape[0], search.num_offspring
    genes = jax.eval_shape(lambda tree: tree, genes)
    few = jax.eval_shape(lambda tree: operators.take(tree, jnp.zeros(children, int)), genes)
    key = jax.random.key(0)
    fitness: Any = jax.ShapeDtypeStruct((size,), jnp.float32)
    of_few: Any = jax.ShapeDtypeStruct((children,), jnp.float32)
    old, new = Population(genes, fitness), Population(few, of_few)
    chosen = jax.ShapeDtypeStruct((2 * children,), jnp.int32)
    calls: dict[str, tuple[str, Callable[[], Any], PyTree]] = {
        "select": ("selection", lambda: search.select(key, _zeros(fitness), 2 * children), chosen),
        "cross": ("crossover", lambda: search.cross(key, _zeros(few), _zeros(few)), few),
        "mutate": ("mutation", lambda: search.mutate(key, _zeros(few)), few),
        "survive": ("survival", lambda: search.survive(key, _zeros(old), _zeros(new)), old),
    }
    for operator, (name, call, wanted) in calls.items():
        if hasattr(search, operator):
            _check(name, call, wanted)


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _check(name: str, call: Callable[[], Any], wanted: PyTree) -> None:
    try:
        found = jax.eval_shape(call)
    except Exception as error:  # whatever a user's own function raises
        raise ConfigError(f"evolution.{name} failed: {first_line(error)}") from error
    if told(found) != told(wanted):
        raise ConfigError(f"evolution.{name} gives {told(found)}: {told(wanted)} is needed")


def from_config(config: Any, tools: Tools) -> GeneticAlgorithm:
    """The genetic algorithm that a configuration section describes.

    Args:
        config: names of operators, or functions in their place.
        tools: what the problem gives.

    Raises:
        ConfigError: a crossover would blend genes that pick one parent each, or such genes should
            learn by gradients; children cannot both race and learn.
    """
    space = tools.space
    crossover, mutation = config.crossover, config.mutation
    if crossover is None:
        crossover = ("uniform",) if space.picks else ("uniform", "arithmetic")
    if mutation is None:
        mutation = "reset" if space.picks else "gaussian"
    names = (crossover,) if isinstance(crossover, str) else crossover
    if isinstance(names, tuple) and space.picks:
        blending = [name for name in names if name in BLENDING]
        config.require(not blending, "crossover", f"binary genes cannot be blended by {blending}")
    elites = config.elites if config.survival == "generational" else 0
    improve, cost = None, 0
    if config.gradient_steps:
        race = tools.race
        config.require(race is None, "gradient_steps", "children race or learn, not both")
        descent = descent_of(config, tools, config.gradient_steps)
        assert tools.improve is not None  # whoever gives an objective gives this
        improve, cost = bind(tools.improve, descent=descent), config.gradient_steps * descent.cost
    return GeneticAlgorithm(
        tools.evaluate,
        num_offspring=config.population_size - elites,
        select=_selection(config),
        cross=_crossover(names, space.gene_ndim),
        mutate=_mutation(mutation, config, space),
        survive=SURVIVALS[config.survival] if isinstance(config.survival, str) else config.survival,
        repair=Method(space, "repair"),
        race=tools.race,
        improve=improve,
        improve_cost=cost,
    )


def _selection(config: Any) -> Selection:
    if not isinstance(config.selection, str):
        return config.selection
    if config.selection == "tournament":
        return bind(operators.tournament, size=config.tournament_size)
    return SELECTIONS[config.selection]


def _crossover(names: Any, gene_ndim: int | None) -> Crossover:
    if not isinstance(names, tuple):
        return names
    among = tuple(bind(CROSSOVERS[name], gene_ndim=gene_ndim) for name in names)
    return among[0] if len(among) == 1 else bind(operators.choose_one, among=among)


def _mutation(mutation: Any, config: Any, space: Space) -> Mutation:
    if callable(mutation):
        return mutation
    rate = config.mutation_rate
    if rate is None:
        rate = max(0.01, 1 / space.num_genes)
    known = {
        "gaussian": bind(Method(space, "noise"), rate=rate, scale=config.mutation_scale),
        "reset": bind(
            operators.reset, rate=rate, sample=Method(space, "sample"), gene_ndim=space.gene_ndim
        ),
    }
    names = (mutation,) if isinstance(mutation, str) else mutation
    chosen = tuple(known[name] for name in names)
    return chosen[0] if len(chosen) == 1 else bind(operators.apply_all, mutations=chosen)
