"""Paired statistics against scipy, statsmodels and simulation."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from gramlite.bench import statistics as st
from scipy import stats


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (9, 3), (40, 41), (120, 70), (7, 7)]
)
def test_mcnemar_equals_scipy_and_statsmodels(lost: int, gained: int) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    ours = st.mcnemar_exact(lost, gained)
    assert ours == pytest.approx(float(mcnemar([[50, lost], [gained, 30]], exact=True).pvalue), abs=1e-12)
    if lost + gained:
        assert ours == pytest.approx(stats.binomtest(lost, lost + gained).pvalue, abs=1e-12)


def test_holm_equals_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    generator = np.random.default_rng(3)
    for size in (1, 2, 7, 40):
        p_values = list(generator.uniform(0, 0.2, size)) + [0.01, 0.01]
        assert st.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)
    assert st.holm([]) == []


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (10, 10), (37, 400), (3, 1069)])
def test_rate_intervals_equal_scipy(k: int, n: int) -> None:
    exact = stats.binomtest(k, n).proportion_ci(method="exact")
    assert st.clopper_pearson(k, n) == pytest.approx((exact.low, exact.high), abs=1e-12)
    estimate = st.rate_interval([True] * k + [False] * (n - k))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((k / n, exact.low, exact.high), abs=1e-12)


def test_bootstrap_agrees_with_scipy_percentile() -> None:
    generator = np.random.default_rng(5)
    verdicts = generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.85, 0.05], size=400)
    margins = generator.normal(0.7, 1.3, size=900)
    for values in (verdicts, margins):
        ours = st.bootstrap_mean(values, seed=1, resamples=20_000)
        theirs = stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, method="percentile", rng=generator
        ).confidence_interval
        near = max(0.03 * (theirs.high - theirs.low), 1.001 / len(values))  # verdicts move by 1/n
        assert abs(ours.low - theirs.low) < near
        assert abs(ours.high - theirs.high) < near


def test_bootstrap_is_seeded_and_fast() -> None:
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=8885)
    start = time.perf_counter()
    first = st.bootstrap_mean(values, seed=7)
    assert time.perf_counter() - start < 1.0
    assert first == st.bootstrap_mean(values, seed=7)
    assert first != st.bootstrap_mean(values, seed=8)


@pytest.mark.parametrize(
    ("n", "lost", "gained"),
    [
        (200, 0.10, 0.05),
        (200, 0.05, 0.05),
        (400, 0.08, 0.04),
        pytest.param(1000, 0.03, 0.01, marks=pytest.mark.slow),
        pytest.param(1000, 0.15, 0.10, marks=pytest.mark.slow),
    ],
)
def test_paired_bootstrap_covers_the_truth(n: int, lost: float, gained: float) -> None:
    generator = np.random.default_rng(11)
    tables = generator.multinomial(n, [gained, lost, 1 - lost - gained], size=2000)
    hits = 0
    for index, (up, down, _) in enumerate(tables):
        values = np.zeros(n)
        values[:up], values[up : up + down] = 1.0, -1.0
        estimate = st.bootstrap_mean(values, step=1.0, seed=index, resamples=1000)
        hits += estimate.low - 1e-12 <= gained - lost <= estimate.high + 1e-12
    assert hits / len(tables) == pytest.approx(0.95, abs=0.015)


@pytest.mark.slow
def test_paired_bootstrap_covers_the_truth_with_clusters() -> None:
    generator = np.random.default_rng(12)
    prompts, rows, hits, naive_hits, models = 150, 4, 0, 0, 2000
    clusters = [prompt for prompt in range(prompts) for _ in range(rows)]
    for index in range(models):
        harm = generator.beta(0.5, 4.5, size=prompts)  # a prompt hurts all of its rows alike
        values = -(generator.random((prompts, rows)) < harm[:, None]).astype(float).ravel()
        values += (generator.random(prompts * rows) < 0.05) * (values == 0)
        truth = -0.1 + 0.9 * 0.05
        estimate = st.bootstrap_mean(values, clusters=clusters, step=1.0, seed=index, resamples=1000)
        naive = st.bootstrap_mean(values, step=1.0, seed=index, resamples=1000)
        hits += estimate.low <= truth <= estimate.high
        naive_hits += naive.low <= truth <= naive.high
    assert hits / models == pytest.approx(0.95, abs=0.015)
    assert naive_hits < hits


def test_no_change_is_not_certainty() -> None:
    few = st.bootstrap_mean(np.zeros(10), step=1.0)
    many = st.bootstrap_mean(np.zeros(2000), step=1.0)
    assert few.value == 0
    assert few.low < -0.05
    assert -0.003 < many.low < 0
    one_way = st.bootstrap_mean([-1.0] * 3 + [0.0] * 97, step=1.0)
    assert one_way.low < -0.05 and one_way.high > -0.01


def test_clustered_flip_rate_is_wider_and_covers() -> None:
    generator = np.random.default_rng(4)
    prompts, rows, hits = 120, 5, 0
    clusters = [prompt for prompt in range(prompts) for _ in range(rows)]
    for _ in range(1000):
        rates = generator.beta(0.6, 6.4, size=prompts)
        flips = (generator.random((prompts, rows)) < rates[:, None]).ravel()
        estimate = st.rate_interval(flips, clusters=clusters)
        plain = st.rate_interval(flips)
        assert estimate.high - estimate.low >= plain.high - plain.low - 1e-12
        hits += estimate.low <= 0.6 / 7 <= estimate.high
    assert 0.93 <= hits / 1000 <= 0.985
    assert st.rate_interval([False] * 600, clusters=clusters).high > st.rate_interval([False] * 600).high


def test_design_effect_of_copies_is_the_cluster_size() -> None:
    values = np.repeat(np.random.default_rng(1).choice([0.0, 1.0], size=500), 4)
    clusters = np.repeat(np.arange(500), 4).tolist()
    assert st.design_effect(values, clusters) == pytest.approx(4, rel=0.01)
    assert st.design_effect(values, None) == 1.0


def test_critical_counts_are_the_exact_tests_own() -> None:
    discordant = np.array([*range(1, 400), 5000, 200_000], dtype=np.float64)
    for alpha in (0.05, 0.01):
        critical = st.critical_count(discordant, alpha)
        rejected = stats.binom.cdf(critical, discordant, 0.5)
        assert np.all(rejected <= alpha / 2)
        assert np.all(stats.binom.cdf(critical + 1, discordant, 0.5) > alpha / 2)


def test_power_is_what_simulation_says() -> None:
    generator = np.random.default_rng(8)
    for n, discordance, difference in ((200, 0.15, 0.06), (500, 0.08, 0.03), (80, 0.3, 0.2)):
        gained, lost = (discordance - difference) / 2, (discordance + difference) / 2
        tables = generator.multinomial(n, [gained, lost, 1 - discordance], size=4000)
        found = np.mean([st.mcnemar_exact(int(down), int(up)) <= 0.05 for up, down, _ in tables])
        assert st.mcnemar_power(n, discordance, difference) == pytest.approx(found, abs=0.025)


@pytest.mark.parametrize(("n", "discordance"), [(200, 0.10), (500, 0.05), (1000, 0.10), (1069, 0.02), (60, 0.3)])
def test_minimum_detectable_effect_has_80_percent_power(n: int, discordance: float) -> None:
    effect = st.minimum_detectable_effect(n, discordance)
    assert effect is not None
    rate = max(discordance, effect)
    shares = [(rate - effect) / 2, (rate + effect) / 2]
    tables = np.random.default_rng(21).multinomial(n, [*shares, 1 - rate], size=4000)
    found = np.mean([st.mcnemar_exact(int(down), int(up)) <= 0.05 for up, down, _ in tables])
    assert found == pytest.approx(0.80, abs=0.03)


def test_minimum_detectable_effect_is_unknown_from_too_few() -> None:
    assert st.minimum_detectable_effect(5, 0.1) is None
    assert st.minimum_detectable_effect(0, 0.1) is None


def test_pairs_needed_inverts_the_detectable_effect() -> None:
    for difference, discordance in ((0.01, 0.05), (0.03, 0.1), (0.05, 0.02)):
        n = st.pairs_needed(difference, discordance)
        assert n is not None
        effect = st.minimum_detectable_effect(n, discordance)
        assert effect == pytest.approx(difference, rel=0.02)
    assert st.pairs_needed(1e-6, 0.5) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        st.pairs_needed(0.0, 0.1)


def test_pairs_to_settle_does_settle() -> None:
    generator = np.random.default_rng(2)
    values = generator.choice([-1.0, 0.0, 1.0], p=[0.06, 0.88, 0.06], size=300)
    now = st.bootstrap_mean(values, step=1.0)
    threshold = now.value - 0.02
    assert now.low < threshold
    n = st.pairs_to_settle(now, threshold)
    assert n is not None and n > 300
    shares = [float((values == v).mean()) for v in (-1.0, 0.0, 1.0)]
    settled = 0
    for seed in range(300):
        later = generator.choice([-1.0, 0.0, 1.0], p=shares, size=n)
        settled += st.bootstrap_mean(later, step=1.0, seed=seed, resamples=500).low >= threshold
    assert settled / 300 == pytest.approx(0.8, abs=0.08)
    assert st.pairs_to_settle(now, now.value) is None
    assert st.pairs_to_settle(st.NOTHING, 0.0) is None


@pytest.mark.parametrize(("rate", "limit"), [(0.0, 0.03), (0.02, 0.03), (0.05, 0.03), (0.97, 0.95), (0.5, 0.6)])
def test_pairs_to_settle_a_rate_do_settle(rate: float, limit: float) -> None:
    now = st.Estimate(rate, 0.0, 1.0, 10)
    n = st.pairs_to_settle_rate(now, limit)
    assert n is not None
    counts = np.random.default_rng(3).binomial(n, rate, size=2000)
    bounds = np.array([st.clopper_pearson(int(count), n) for count in counts])
    settled = bounds[:, 1] <= limit if rate < limit else bounds[:, 0] > limit
    assert settled.mean() >= 0.77
    fewer = int(0.8 * n)
    bounds = np.array(
        [st.clopper_pearson(int(k), fewer) for k in np.random.default_rng(4).binomial(fewer, rate, size=2000)]
    )
    assert (bounds[:, 1] <= limit if rate < limit else bounds[:, 0] > limit).mean() < 0.8


def test_what_cannot_be_settled() -> None:
    assert st.pairs_to_settle_rate(st.Estimate(0.03, 0, 1, 10), 0.03) is None
    assert st.pairs_to_settle_rate(st.NOTHING, 0.03) is None
    assert st.pairs_to_settle_rate(st.Estimate(0.0, 0, 1, 10), 0.03) == pytest.approx(122, abs=2)


def test_divergence_is_scipy_entropy() -> None:
    for p, q in ((0.5, 0.5), (0.9, 0.6), (1.0, 0.3), (0.2, 0.7)):
        assert st.verdict_divergence(p, q) == pytest.approx(stats.entropy([p, 1 - p], [q, 1 - q]), abs=1e-6)
    assert math.isfinite(st.verdict_divergence(1.0, 0.0))


def test_pareto_front() -> None:
    sizes, quality = [270.0, 145.0, 90.0, 95.0, 145.0], [0.70, 0.70, 0.60, 0.58, 0.69]
    assert st.pareto_front(sizes, quality) == [1, 2]
    assert st.pareto_front([1.0, 1.0], [0.5, 0.5]) == [0, 1]


def test_estimates_without_rows_say_nothing() -> None:
    assert st.bootstrap_mean([]).to_json() == {"value": None, "low": None, "high": None, "n": 0}
    assert st.rate_interval([]).n == 0
    with pytest.raises(ValueError, match="clusters"):
        st.bootstrap_mean([1.0, 2.0], clusters=["a"])
