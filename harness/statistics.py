# SPDX-License-Identifier: Apache-2.0
"""Equivalence tests, dependent bootstrap and minimum detectable change, on plain arrays.

The bootstrap and its block length are small enough to stand here: importing ``arch`` takes longer than a whole grading
may. Tests hold both against ``arch`` and the tests of equivalence against ``statsmodels``.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

MIN_BLOCK = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its standard error and degrees of freedom."""

    mean: float
    se: float
    df: float

    def interval(self, alpha: float) -> tuple[float, float]:
        """Two-sided interval with probability `alpha` on each side (Student's t)."""
        half = t_quantile(1.0 - alpha, self.df) * self.se if self.se > 0 else 0.0
        return self.mean - half, self.mean + half


def t_quantile(probability: float, df: float) -> float:
    """Quantile of Student's t; `df` may be fractional or infinite."""
    return float(stdtrit(min(df, 1e9), probability))


def log_ratio(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """``ln(values / reference)``, elementwise. Both must be positive."""
    return np.log(values) - np.log(reference)


def optimal_block_length(values: np.ndarray) -> float:
    """Expected block length of a stationary bootstrap for the mean of `values`.

    Politis and White (2004) with the correction of Patton, Politis and White (2009): the flat-top lag window is cut
    where autocorrelations stay insignificant.
    """
    n = len(values)
    centred = values - values.mean()
    variance = float(centred @ centred) / n
    # A constant series, up to rounding, carries no noise to resample.
    if n < 8 or variance <= (1e-13 * max(1.0, float(np.abs(values).max()))) ** 2:
        return MIN_BLOCK
    run = max(5, int(math.log10(n)))
    longest = math.ceil(math.sqrt(n)) + run
    lags = min(longest + run, n - 2)
    covariances = np.array([float(centred[lag:] @ centred[: n - lag]) / n for lag in range(lags + 1)])
    correlations = np.abs(covariances[1:]) / covariances[0]
    threshold = 2.0 * math.sqrt(math.log10(n) / n)
    cut = _first_quiet_lag(correlations, threshold, run)
    window = min(2 * cut, longest, lags)
    lag = np.arange(1, window + 1)
    weights = np.where(lag / window <= 0.5, 1.0, 2.0 * (1.0 - lag / window))
    spectrum = covariances[0] + 2.0 * float(weights @ covariances[1 : window + 1])
    slope = 2.0 * float((weights * lag) @ covariances[1 : window + 1])
    if spectrum == 0.0:
        return MIN_BLOCK
    length = (slope**2 / spectrum**2) ** (1 / 3) * n ** (1 / 3)
    return float(min(max(length, MIN_BLOCK), math.ceil(min(3 * math.sqrt(n), n / 3))))


def stationary_bootstrap_indices(
    n: int, block_length: float, num_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Indices of resamples made of blocks of geometric length that wrap around, [num_resamples, n].

    Politis and Romano (1994).
    """
    starts = rng.integers(0, n, size=(num_resamples, n), dtype=np.int32)
    is_new = rng.random((num_resamples, n), dtype=np.float32) < 1.0 / block_length
    is_new[:, 0] = True
    position = np.arange(n, dtype=np.int32)
    origin = np.maximum.accumulate(np.where(is_new, position, 0), axis=1)
    return (np.take_along_axis(starts, origin, axis=1) + position - origin) % n


def bootstrap_statistics(
    values: np.ndarray, *, statistic: str, num_resamples: int, seed: int, block_length: float | None = None
) -> np.ndarray:
    """Mean or median of stationary-bootstrap resamples, [num_resamples]."""
    length = optimal_block_length(values) if block_length is None else block_length
    indices = stationary_bootstrap_indices(len(values), length, num_resamples, np.random.default_rng(seed))
    samples = values[indices]
    return samples.mean(axis=1) if statistic == "mean" else np.median(samples, axis=1)


def series_mean(values: np.ndarray, *, num_resamples: int, seed: int) -> Estimate:
    """Mean of a dependent series; the error from the stationary bootstrap, the freedom from the number of blocks."""
    length = optimal_block_length(values)
    means = bootstrap_statistics(
        values, statistic="mean", num_resamples=num_resamples, seed=seed, block_length=length
    )
    return Estimate(
        mean=float(values.mean()), se=float(means.std(ddof=1)), df=max(len(values) / length - 1.0, 1.0)
    )


def series_median(values: np.ndarray, *, num_resamples: int, seed: int) -> Estimate:
    """Median of a dependent series, like :func:`series_mean`."""
    length = optimal_block_length(values)
    medians = bootstrap_statistics(
        values, statistic="median", num_resamples=num_resamples, seed=seed, block_length=length
    )
    return Estimate(
        mean=float(np.median(values)), se=float(medians.std(ddof=1)), df=max(len(values) / length - 1.0, 1.0)
    )


def combine(mean: float, parts: list[tuple[float, float]]) -> Estimate:
    """A mean whose error has independent parts, each (variance, degrees of freedom): Welch and Satterthwaite."""
    total = sum(variance for variance, _ in parts)
    if total <= 0.0:
        return Estimate(mean=mean, se=0.0, df=math.inf)
    spread = sum(variance**2 / df for variance, df in parts if variance > 0.0)
    return Estimate(mean=mean, se=math.sqrt(total), df=total**2 / spread if spread else math.inf)


def is_equivalent(interval: tuple[float, float], margin: tuple[float, float]) -> bool:
    """Whether the interval lies inside the margin. Comparisons with nan are false: nan is never equivalent."""
    return margin[0] < interval[0] and interval[1] < margin[1]


def is_different(interval: tuple[float, float], margin: tuple[float, float]) -> bool:
    """Whether the interval lies outside the margin, whole and on one side."""
    return interval[1] < margin[0] or interval[0] > margin[1]


def minimum_detectable_change(
    run_sd: float, *, num_reference: int, num_candidate: int = 1, alpha: float, power: float
) -> float:
    """Smallest shift that a one-sided two-sample t-test on run means finds with the given power.

    Freedom is that of both samples together; with one run on each side there is none and the answer is infinite.
    """
    df = num_reference + num_candidate - 2
    if run_sd == 0.0:
        return 0.0
    if df < 1:
        return math.inf
    error = run_sd * math.sqrt(1.0 / num_reference + 1.0 / num_candidate)
    return (t_quantile(1.0 - alpha, df) + t_quantile(power, df)) * error


def detectable_change(estimate: Estimate, *, alpha: float, power: float) -> float:
    """Smallest shift that a test with this standard error finds with the given power."""
    if estimate.se == 0.0:
        return 0.0
    return (t_quantile(1.0 - alpha, estimate.df) + t_quantile(power, estimate.df)) * estimate.se


def run_sd(run_means: np.ndarray, within_variance: float = 0.0) -> float:
    """Run-to-run standard deviation of a run's mean, without what noise inside a run explains.

    Args:
        run_means: One mean a run.
        within_variance: Average variance of such a mean from noise inside its run.
    """
    if len(run_means) < 2:
        return 0.0
    return math.sqrt(max(float(np.var(run_means, ddof=1)) - within_variance, 0.0))


def detrend(values: np.ndarray) -> np.ndarray:
    """What a straight line leaves."""
    n = len(values)
    if n < 3:
        return values - values.mean()
    position = np.arange(n) - (n - 1) / 2.0
    slope = float(position @ values) / float(position @ position)
    return values - values.mean() - slope * position


def literal_false_alarm_rate(log_losses: np.ndarray, margin: float) -> float:
    """Share of healthy pairs that "one point within `margin`" fails when the data order differs.

    Every pair of points of a detrended end window stands for a candidate and a baseline with the same expected loss.

    Args:
        log_losses: ln(loss) over the end window of a healthy run.
        margin: Relative margin of the rule.
    """
    noise = detrend(log_losses)
    ratio = np.exp(noise[:, None] - noise[None, :])
    off_diagonal = ~np.eye(len(noise), dtype=bool)
    return float((np.abs(ratio[off_diagonal] - 1.0) > margin).mean())


def block_means(values: np.ndarray, size: int) -> np.ndarray:
    """Means of consecutive blocks; a shorter rest at the end is left out unless it is all there is."""
    num_blocks = len(values) // size
    if num_blocks == 0:
        return np.array([values.mean()])
    return values[: num_blocks * size].reshape(num_blocks, size).mean(axis=1)


def simultaneous_band(
    values: np.ndarray, size: int, *, confidence: float, num_resamples: int, seed: int
) -> float:
    """Largest absolute block mean that noise like `values` (centred here) reaches with this confidence."""
    centred = values - values.mean()
    indices = stationary_bootstrap_indices(
        len(centred), optimal_block_length(centred), num_resamples, np.random.default_rng(seed)
    )
    num_blocks = max(len(centred) // size, 1)
    used = centred[indices][:, : num_blocks * size] if len(centred) >= size else centred[indices]
    means = used.reshape(num_resamples, num_blocks, -1).mean(axis=2)
    return float(np.quantile(np.abs(means).max(axis=1), confidence))


def _first_quiet_lag(correlations: np.ndarray, threshold: float, run: int) -> int:
    """First lag that begins a run of insignificant correlations, as ``arch`` counts it.

    One more than the last significant lag; without such a run, one more than the last of all.
    """
    significant = correlations >= threshold
    for start in range(len(correlations) - run + 1):
        if not significant[start : start + run].any():
            return start + 1
    return int(np.flatnonzero(significant)[-1]) + 2
