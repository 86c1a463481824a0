"""The power calculation of the ablation, against simulation and the document."""

from pathlib import Path

import ablation_power
import numpy as np
import pytest
from scipy import stats


def test_pairs_detect_an_effect_as_often_as_said():
    generator = np.random.default_rng(0)
    for effect, pairs in ((0.5, 44), (1.5, 8), (3.0, 4)):
        assert abs(ablation_power.pairs_needed(effect, 1.0) - pairs) <= 1
        pairs = ablation_power.pairs_needed(effect, 1.0)
        found = stats.ttest_1samp(generator.normal(effect, 1, (20_000, pairs)), 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(ablation_power.power(effect, 1.0, pairs), abs=0.01)
        assert ablation_power.power(effect, 1.0, pairs - 1) < 0.9 <= ablation_power.power(effect, 1.0, pairs)
    assert ablation_power.pairs_needed(-0.5, 1.0) == ablation_power.pairs_needed(0.5, 1.0)
    smallest = ablation_power.smallest_effect(24, 0.011)
    assert ablation_power.pairs_needed(smallest * 1.001, 0.011) == 24


@pytest.mark.parametrize(("effect", "sd"), [(0, 1), (float("nan"), 1), (1, 0), (1, float("nan")), (1, float("inf"))])
def test_what_cannot_be_resolved_is_refused(effect, sd):
    with pytest.raises(ValueError, match="cannot be resolved by any number of pairs. Set both"):
        ablation_power.pairs_needed(effect, sd)


def test_document_has_the_table():
    document = (Path(__file__).parents[1] / "docs/scaling.md").read_text()
    assert ablation_power.power_table() in document
    half = stats.t.ppf(0.975, 23) * ablation_power.PAIR_SD / 24**0.5
    smallest = ablation_power.smallest_effect(ablation_power.NUM_PAIRS, ablation_power.PAIR_SD)
    assert f"± {half:.4f} and detect {smallest:.4f} with 90 % power" in document
