"""What a configuration cites."""

import re

import pytest

import megajax as mj
from megajax.baselines import BASELINES
from megajax.citations import PAPERS
from megajax.search.methods import METHODS


def cited(*sections):
    return re.findall(r"@misc\{(\w+),", mj.citation(*sections))


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (mj.AlignConfig(method="activations"), ["git_re_basin"]),
        (mj.AlignConfig(method="none"), []),
        (mj.RecalibrateConfig(enabled=True), ["repair"]),
        (mj.GenomeConfig(kind="task_vectors", trim=True), ["task_arithmetic", "ties"]),
        (mj.EvolutionConfig(method="nsga2"), ["nsga2"]),
        (mj.EvolutionConfig(method="niches"), ["m2n2"]),
        (mj.EvolutionConfig(method="sep_cma_es"), ["sep_cma_es", "evosax"]),
        (mj.EvolutionConfig(gradient_steps=2), ["adam"]),
        (mj.BaselinesConfig(names=("fisher", "regmean", "dare")), ["fisher", "regmean", "dare"]),
    ],
)
def test_a_section_cites_mega_and_its_methods(section, names):
    assert cited(section) == ["mega", *names]


def test_a_configuration_cites_each_paper_once():
    config = mj.Config(baselines=mj.BaselinesConfig(names="all"))
    names = cited(config, mj.AlignConfig())
    assert len(names) == len(set(names))
    assert set(names) == {"mega", "git_re_basin", "evosax", "soups", *({*BASELINES} & {*PAPERS})}


def test_every_search_with_a_paper_has_an_entry_that_balances():
    assert {*METHODS} - {*PAPERS} == {"genetic", "random", "gradient", "niches"}
    text = mj.citation(mj.Config(baselines=mj.BaselinesConfig(names="all")))
    assert text.count("{") == text.count("}")


def test_what_is_no_section_is_refused():
    with pytest.raises(mj.ConfigError, match="citation takes sections, not a dict"):
        mj.citation({})
