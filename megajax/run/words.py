"""A configuration in words: what the report says under "What was run".

Knows the sections' fields and what they mean; nothing of data or networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megajax.formats.mapping import some
from megajax.run.config import Config

__all__ = ["settings"]

_SEARCHES = {
    "genetic": "genetic algorithm",
    "gradient": "gradient descent (Adam) on the genes",
    "random": "random search",
    "niches": "genetic algorithm with niches (M2N2)",
    "nsga2": "NSGA-II",
    "one_plus_one": "(1 + 1) evolution",
    "pbil": "PBIL",
    "cma_es": "CMA-ES",
    "sep_cma_es": "separable CMA-ES",
    "differential_evolution": "differential evolution",
}
_SHARDS = {
    "same": "each on all training images",
    "disjoint": "each on its own part of the training images",
    "skewed": "each at home in its own classes, of which it gets {skew:.0f} % of the images",
}
_ALIGNMENTS = {
    "weights": "by their weights",
    "activations": "by their activations",
    "both": "by their activations, then by their weights",
}


def settings(config: Config, *, parameters: int, genes: int | None) -> dict[str, str]:
    """The choices that a reader needs in order to judge a result: subject -> words.

    Args:
        config: every choice.
        parameters: numbers in one network, statistics included.
        genes: of an individual.

    Example:
        >>> settings(Config(), parameters=1000, genes=50)["alignment"]
        'hidden units matched by their weights, to parent 0'
    """
    return dict(_settings(config, parameters, genes))


def _settings(config: Config, parameters: int, genes: int | None) -> Iterator[tuple[str, str]]:
    parents, training, evolution = config.parents, config.training, config.evolution
    yield (
        "network",
        f"{_names(config.model.name)}{_options(config.model.options)}, {parameters:,} numbers",
    )
    if parents.paths:
        yield "parents", f"{parents.count}, loaded from {some(parents.paths)}"
    else:
        seen = _SHARDS[parents.shards].format(skew=100 * parents.skew)
        start = "the same" if parents.shared_initialization else "different"
        yield "parents", f"{parents.count}, trained {seen}; from {start} initial weights"
        augmented = f", images varied by {_names(training.augment)}" if training.augment else ""
        yield (
            "training",
            f"{training.epochs} epochs of {training.optimizer}, learning rate "
            f"{training.learning_rate:g} ({training.schedule}), batches of {training.batch_size}"
            f"{augmented}",
        )
    if config.align.method == "none":
        yield "alignment", "none"
    else:
        to = (
            "their mean" if config.align.reference == "mean" else f"parent {config.align.reference}"
        )
        yield "alignment", f"hidden units matched {_ALIGNMENTS[config.align.method]}, to {to}"
    if config.recalibrate.enabled:
        examples = config.recalibrate.examples
        yield "statistics", f"measured anew in every candidate, on {examples:,} training images"
    yield "genes", _genome(config, genes)
    yield "fitness", _fitness(config)
    if config.hierarchy.enabled:
        yield "tree", f"two by two, paired by {_names(config.hierarchy.pairing)}"
    yield "search", _search(config)
    if evolution.evaluation_budget is not None:
        yield "budget of the search", f"{evolution.evaluation_budget:,} networks"
    if config.finetune.epochs:
        yield "fine-tuning", f"{config.finetune.epochs} epochs, as for the best parent"


def _genome(config: Config, genes: int | None) -> str:
    genome, count = config.genome, "" if genes is None else f"{genes:,} "
    match genome.kind:
        case "masks":
            picks = "; each picks one parent" if genome.binary else ""
            words = f"{count}{genome.granularity} masks{picks}"
        case "task_vectors":
            words = f"{count}coefficients of task vectors, by {genome.granularity}"
        case _:
            words = "the weights themselves"
    return words + (f"; {genome.freeze} left as in parent 0" if genome.freeze else "")


def _fitness(config: Config) -> str:
    fitness = config.fitness
    if fitness.tasks:
        scores = (
            "scores in units of the best parent's" if fitness.combine == "relative" else "scores"
        )
        return f"weighted mean of the {scores} on the tasks {_names(fitness.tasks)}"
    name = "cross_entropy" if fitness.metric is None else _names(fitness.metric)
    if name == "distill":
        return "agreement with the parents' mean prediction on training images, without labels"
    words = {"cross_entropy": "negative cross-entropy"}.get(name, name.replace("_", " "))
    part = "test" if fitness.select_on_test else "validation"
    first = ""
    if fitness.racing_examples is not None:
        first = f"; a child is scored on {fitness.racing_examples:,} of them first"
    return f"{words} on the {part} images{first}"


def _search(config: Config) -> str:
    evolution = config.evolution
    words = (
        f"{_SEARCHES.get(evolution.method, evolution.method)}, population "
        f"{evolution.population_size:,}, at most {evolution.generations:,} generations"
    )
    if evolution.method != "genetic":
        return words
    chosen = {name: getattr(evolution, name) for name in ("crossover", "mutation", "survival")}
    operators = [f"{_names(evolution.selection)} selection"]
    operators += [f"{_names(value)} {name}" for name, value in chosen.items() if value is not None]
    return f"{words}; {', '.join(operators)}"


def _options(options: Any) -> str:
    named = ", ".join(f"{name} {value}" for name, value in options.items())
    return f" ({named})" if named else ""


def _names(value: Any) -> str:
    """One choice or several: names, or functions."""
    if isinstance(value, tuple):
        return " and ".join(map(_names, value))
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
