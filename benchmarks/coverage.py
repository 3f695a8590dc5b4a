"""How often intervals hold the truth, and how often equal losses are called different.

    python benchmarks/coverage.py [--studies 2000]

Simulated studies of three losses that do not differ. A loss's mean Dice has a standard deviation
of `seed` between trainings, and of `set` between networks that learn from other patients.
`needed` is half the width that an interval would have if these were known.
"""
import argparse

import numpy as np
import pandas as pd
from scipy import stats

from levit_study.evidence.intervals import (
    _draw_nested, bootstrap_interval, fold_interval, tabulate_trainings)
from levit_study.evidence.simulation import made_up_folds
from levit_study.evidence.statistics import PRIOR, SEED_SD, holm

PAIRS = (1, 0), (2, 0), (2, 1)
PATIENT, REST = .042, .03  # of a difference between patients; of a patient in a training


def draw(random, studies, folds, seeds, patients, training_set, seed):
    "Return Dice less its mean: (studies, losses, folds, seeds, patients)"
    sds = PATIENT, training_set, seed, REST
    made = made_up_folds(3 * studies, folds, seeds, patients, sds, None, random)
    return made.reshape(studies, 3, folds, seeds, patients)


def corrected(made, confidence=.95):
    "Return the limits of the corrected t interval, and p"
    means = made.mean(3).reshape(len(made), -1)
    middle, number, folds = means.mean(1), means.shape[1], made.shape[1]
    error = (1 / number + 1 / (folds - 1)) ** .5 * means.std(1, ddof=1)
    reach = stats.t.ppf((1 + confidence) / 2, number - 1) * error
    return middle - reach, middle + reach, 2 * stats.t.sf(abs(middle) / error, number - 1)


def nested(made, confidence=.95, resamples=2000):
    "Return the same of the bootstrap over folds, seeds and patients"
    studies, folds, seeds, patients = made.shape
    parts = [made.mean(2).var(2, ddof=1).sum(1) / patients / folds**2,
             made.mean((2, 3)).var(1, ddof=1) / folds]
    units, freedom = [folds * patients, folds], [folds * (patients - 1), folds - 1]
    if seeds > 1:
        parts.append(made.mean(3).var(2, ddof=1).sum(1) / seeds / folds**2)
        units, freedom = [*units, folds * seeds], [*freedom, folds * (seeds - 1)]
    variance, middle = sum(parts), made.mean((1, 2, 3))
    narrowed = sum(part * n / of for part, n, of in zip(parts, freedom, units, strict=True))
    free = variance**2 / sum(part**2 / n for part, n in zip(parts, freedom, strict=True))
    quantile = stats.t.ppf((1 + confidence) / 2, free)
    weights = _draw_nested(np.random.default_rng(0), np.repeat(range(folds), seeds),
                           np.repeat(range(folds), patients), resamples)
    of_patients = weights[0].reshape(resamples, folds, 1, patients)
    of_trainings = weights[1].reshape(resamples, folds, seeds, 1)
    weights = (of_patients * of_trainings).reshape(resamples, -1)
    drawn = made.reshape(studies, -1) @ (weights / weights.sum(1, keepdims=True)).T
    tails = stats.norm.cdf(-quantile * (variance / narrowed) ** .5)
    ends = np.array([np.quantile(each, [tail, 1 - tail])
                     for each, tail in zip(drawn, tails, strict=True)]).T
    reach = quantile * variance**.5
    few = free < 7  # as the room does
    low, high = np.where(few, middle - reach, ends[0]), np.where(few, middle + reach, ends[1])
    return low, high, 2 * stats.t.sf(abs(middle) / variance**.5, free)


def wider(made, confidence=.95):
    "Return the limits and p of the wider of both"
    (low, high, p), (lower, higher, larger) = corrected(made, confidence), nested(made, confidence)
    return np.minimum(low, lower), np.maximum(high, higher), np.maximum(p, larger)


def split(made):
    "Return limits and p of each pair's interval for any training, of studies in one split"
    means = made.mean(4)[:, :, 0]
    seeds, patients = made.shape[3:]
    freedom = PRIOR + 3 * (seeds - 1)
    squares = ((means - means.mean(2, keepdims=True)) ** 2).sum((1, 2))
    chance = ((PRIOR * SEED_SD**2 + squares) / freedom * 2 / seeds) ** .5
    for first, second in PAIRS:
        by_patient = (made[:, first] - made[:, second]).mean((1, 2))
        error = by_patient.std(1, ddof=1) / patients**.5
        reach = np.hypot(stats.t.ppf(.975, patients - 1) * error,
                         stats.t.ppf(.975, freedom) * chance)
        both = error**2 + chance**2
        of_both = both**2 / (error**4 / (patients - 1) + chance**4 / freedom)
        middle = by_patient.mean(1)
        p = 2 * stats.t.sf(abs(middle) / both**.5, of_both)
        yield middle - reach, middle + reach, p


def row(random, studies, folds, seeds, patients, training_set, seed):
    "Return what one design promises and holds"
    made = draw(random, studies, folds, seeds, patients, training_set, seed)
    pairs = [made[:, first] - made[:, second] for first, second in PAIRS]
    sides = list(split(made) if folds == 1 else map(wider, pairs))
    low, high, p = map(np.array, zip(*sides, strict=True))
    excluded, alarm = (low > 0) | (high < 0), np.array([holm(each) < .05 for each in p.T]).T
    return {"folds": folds, "seeds": seeds, "patients": folds * patients, "set": training_set,
            "seed": seed, "holds the truth": f"{1 - excluded.mean():.1%}",
            "false alarm": f"{(excluded & alarm).any(0).mean():.1%}",
            "half width": (high - low).mean() / 2,
            "needed": 1.96 * np.std([pair.mean((1, 2, 3)) for pair in pairs])}


def check(random):
    "The interval of many studies at once agrees with the package's"
    made = draw(random, 1, 5, 2, 20, .007, .009)[:, 0]
    fold, seed, patient = (each.ravel() for each in np.indices(made.shape[1:]))
    units = fold * 20 + patient, seed, fold, 0 * fold
    ours = fold_interval(*tabulate_trainings(made.ravel(), *units))
    low, high, _ = wider(made)
    assert np.allclose([low[0], high[0]], ours[1:3], atol=1e-3), (ours, low, high)


def distances(random, patients, missed, studies=200):
    "Return how often the interval of mean HD95 over patients holds it, misses at 504 mm"
    values = random.gamma(1.5, 12, (studies, patients, 6)) * random.lognormal(
        -.18, .6, (studies, patients, 1))
    rate = np.clip(missed * random.lognormal(-.72, 1.2, (studies, patients, 1)), 0, 1)
    values = np.where(random.random(values.shape) < rate, 504, values)
    truth = values.mean()
    sides = [bootstrap_interval(each.mean(1), resamples=500) for each in values]
    below = np.mean([each.high < truth for each in sides])
    held = np.mean([each.low <= truth <= each.high for each in sides])
    return {"patients": patients, "missed": missed, "holds the truth": f"{held:.0%}",
            "lies below it": f"{below:.0%}"}


def calibration(random, studies, fold, training_set, seed, seeds):
    "Return how often the interval of a calibration error holds it: five folds, their own patients"
    shared = .75**.5 * random.normal(size=(studies, 1, 1, 1))
    sources = shared + .5 * random.normal(size=(studies, 5, 1, 1))
    made = fold * random.normal(size=(studies, 5, 1, 1)) + training_set * sources
    low, high, _ = corrected(made + seed * random.normal(size=(studies, 5, seeds, 1)))
    held = ((low <= 0) & (high >= 0)).mean()
    return {"fold": fold, "set": training_set, "seed": seed, "seeds": seeds,
            "holds the truth": f"{held:.0%}"}


def equality(random, studies, seed, times):
    "Return how often equal losses are called equal within 0.01, with `times` the least trainings"
    sd = 2**.5 * seed
    least = next(n for n in range(2, 1000) if stats.t.ppf(.975, n - 1) * sd / n**.5 < .01)
    made = random.normal(0, sd, (studies, round(times * least)))
    error = made.std(1, ddof=1) / made.shape[1] ** .5
    reach = stats.t.ppf(.975, made.shape[1] - 1) * error
    return {"seed": seed, "least": least, "trainings": made.shape[1],
            "called equal": f"{(abs(made.mean(1)) + reach < .01).mean():.0%}"}


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--studies", type=int, default=2000, help="simulated studies per design")
studies = parser.parse_args().studies
random = np.random.default_rng(0)
check(random)
designs = [(5, seeds, 20, training_set, seed) for seeds in (1, 2)
           for training_set in (0, .007, .014) for seed in (.009, .018)]
designs += [(1, seeds, 20, training_set, seed) for seeds in (1, 3)
            for training_set in (0, .007, .014) for seed in (.009, .018, .03)]
print(pd.DataFrame([row(random, studies, *design) for design in designs]).round(3)
      .to_string(index=False))
print("\nExpected calibration error, spreads as in acdc_100_small")
print(pd.DataFrame([calibration(random, studies, *spreads, seeds) for seeds in (1, 2)
                    for spreads in ((.02, .005, .0045), (.03, .01, .005))]).to_string(index=False))
print("\nEqual losses within a margin of 0.01")
print(pd.DataFrame([equality(random, studies, seed, times) for seed in (.004, .008)
                    for times in (1, 2)]).to_string(index=False))
print("\nMean HD95 of one training")
print(pd.DataFrame([distances(random, patients, missed) for patients in (20, 100)
                    for missed in (0, .0075, .03)]).to_string(index=False))
