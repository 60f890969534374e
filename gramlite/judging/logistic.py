"""Maximum likelihood for outcomes between 0 and 1 whose log-odds are linear: one Newton's method for two uses.

Bradley-Terry scores of completions and the calibration of a judge's confidence are both this model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEPS = 100
TOLERANCE = 1e-12


def sigmoid(log_odds: Floats) -> Floats:
    """Probabilities of log-odds in nats, exact far out."""
    exponential = np.exp(-np.abs(log_odds))
    result: Floats = np.where(log_odds >= 0, 1.0, exponential) / (1 + exponential)
    return result


def log_likelihood(log_odds: Floats, outcomes: Floats) -> float:
    """The sum of y log p + (1 - y) log(1 - p), for outcomes y in [0, 1]."""
    return float(np.sum(outcomes * log_odds - np.logaddexp(0, log_odds)))


def fit_logistic(
    design: Floats, outcomes: Floats, penalty: Floats, *, offset: Floats | float = 0.0
) -> tuple[Floats, Floats]:
    """The coefficients that maximise the likelihood, and the inverse of its curvature there.

    `design` has shape (observations, coefficients), `outcomes` (observations,) in [0, 1]; the log-odds are
    design @ coefficients + offset. `penalty` (coefficients, coefficients) is the curvature of a quadratic penalty
    ½ c' penalty c; it must make the problem strictly concave, or an outcome without a counterexample has no maximum.
    """

    def objective(coefficients: Floats) -> float:
        likelihood = log_likelihood(design @ coefficients + offset, outcomes)
        return likelihood - 0.5 * float(coefficients @ penalty @ coefficients)

    def curvature(coefficients: Floats) -> tuple[Floats, Floats]:
        chances = sigmoid(design @ coefficients + offset)
        gradient = design.T @ (outcomes - chances) - penalty @ coefficients
        return gradient, design.T @ (design * (chances * (1 - chances))[:, None]) + penalty

    coefficients = np.zeros(design.shape[1])
    value = objective(coefficients)
    for _ in range(STEPS):
        gradient, hessian = curvature(coefficients)
        step = np.linalg.solve(hessian, gradient)
        while (better := objective(coefficients + step)) < value and np.abs(step).max() > TOLERANCE:
            step = step / 2  # far from the maximum a whole Newton step can overshoot
        coefficients, value = coefficients + step, better
        if np.abs(step).max() <= TOLERANCE * (1 + np.abs(coefficients).max()):
            break
    return coefficients, np.asarray(np.linalg.inv(curvature(coefficients)[1]), dtype=np.float64)
