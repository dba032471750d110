"""`bench probe`: a sweep of linear probes over C, ours against scikit-learn's LogisticRegression.

Both fit the same features, which are made, not extracted: class means and within-class noise with a falling spectrum
and a common offset, as image features have, reproducible from the seed. scikit-learn gets float32 features and fits one
C after the other, as in CLIP's protocol, with a tolerance (--tol) that brings it as near to the minimum as ours:
`speedup` is its seconds over `seconds`, ours with setup and compilation (`seconds_again`: a second sweep, compiled).
At its default tolerance of 1e-4 it is faster (`speedup_default`) but stops short of the minimum for large C
(`objective_diff_default`, by how much of its objective ours is higher, hence negative).

`objective_diff` is the largest relative difference of the objectives over the sweep, recomputed in float64 from the
weights of both; `accuracy_diff` the largest difference of the test accuracies, in percentage points.

Needs scikit-learn: pip install '.[eval]'.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from florence_jax.errors import UserError, require
from florence_jax.evaluators.solvers.logistic import Fits, LogisticRegression, objective, sklearn_weights
from florence_jax.params.sharding import make_mesh
from florence_jax.tools.bench import timing

CS = "1e-4,1e-3,1e-2,1e-1,1,1e1"
NORM, OFFSET = 10.0, 5.0  # lengths of the within-class noise and of the common offset


class ProbeData(NamedTuple):
    """Training and test examples: features float32 (N, D) and labels int32 (N,)."""

    train: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench probe`."""
    parser.add_argument("--examples", type=int, default=20_000, help="training examples")
    parser.add_argument("--test", type=int, default=10_000, help="test examples")
    parser.add_argument("--dimensions", type=int, default=512, help="of the features")
    parser.add_argument("--classes", type=int, default=100, help="number of classes")
    parser.add_argument(
        "--separation", type=float, default=0.15, help="length of the class means over that of the noise"
    )
    parser.add_argument("--cs", default=CS, help="values of C, separated by commas")
    parser.add_argument("--tol", type=float, default=1e-7, help="scikit-learn's tolerance")
    parser.add_argument("--no_default", action="store_true", help="skip scikit-learn at its default tolerance")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of our features")
    parser.add_argument("--seed", type=int, default=0, help="of the features")


def make_features(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 (examples + test, dimensions) and labels int32."""
    rng = np.random.default_rng(args.seed)
    count, size = args.examples + args.test, args.dimensions
    scale = (1 + np.arange(size)) ** -0.5
    scale *= NORM / np.linalg.norm(scale)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    means = rng.standard_normal((args.classes, size)) * scale * args.separation
    labels = rng.integers(0, args.classes, count).astype(np.int32)
    features = (means[labels] + rng.standard_normal((count, size)) * scale) @ basis
    return (features + rng.standard_normal(size) * OFFSET / np.sqrt(size)).astype(np.float32), labels


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    cs = _parse_cs(args.cs)
    if min(args.examples, args.test, args.dimensions) < 1 or not 2 <= args.classes <= args.examples:
        raise UserError("--examples, --test and --dimensions must be positive, --classes from 2 to --examples")
    if args.tol <= 0:
        raise UserError(f"--tol={args.tol} must be positive")
    require("sklearn", "bench probe needs scikit-learn: pip install '.[eval]'")
    from sklearn.linear_model import LogisticRegression as model

    features, labels = make_features(args)
    n = args.examples
    split = ProbeData(features[:n], labels[:n], features[n:], labels[n:])
    fits, seconds = _ours(args, cs, split)
    ours = [judge(split, c, fits.weights[i], fits.bias[i]) for i, c in enumerate(cs)]
    theirs, report = _theirs(lambda c: model(C=c, max_iter=10_000, tol=args.tol), cs, split, "")
    report |= {
        "speedup": timing.round_significant(report["sklearn_seconds"] / seconds, 4),
        "accuracy_diff": max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)),
        "objective_diff": max(abs(a[0] / b[0] - 1) for a, b in zip(ours, theirs, strict=True)),
        "seconds": timing.round_significant(seconds, 4),
        "accuracy": [accuracy for _, accuracy in ours],
        "iterations": fits.iterations.tolist(),
    }
    if not args.no_default:
        default, extra = _theirs(lambda c: model(C=c, max_iter=1000), cs, split, "default_")
        extra["speedup_default"] = timing.round_significant(extra["sklearn_default_seconds"] / seconds, 4)
        extra["objective_diff_default"] = [a[0] / b[0] - 1 for a, b in zip(ours, default, strict=True)]
        report |= extra
    report["seconds_again"] = timing.round_significant(_ours(args, cs, split)[1], 4)
    sizes = {name: getattr(args, name) for name in ("examples", "test", "dimensions", "classes", "separation", "seed")}
    return _first(report) | {"cs": cs, "tol": args.tol} | sizes | _machine()


def _first(report: dict[str, Any]) -> dict[str, Any]:
    head = ("speedup", "accuracy_diff", "objective_diff", "seconds")
    return {name: report[name] for name in head} | report


def _parse_cs(text: str) -> list[float]:
    try:
        cs = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--cs={text!r}: write numbers separated by commas") from error
    if not all(0 < c < float("inf") for c in cs):
        raise UserError(f"--cs={text!r}: every C must be positive")
    return cs


def _ours(args: argparse.Namespace, cs: list[float], split: ProbeData) -> tuple[Fits, float]:
    began = time.perf_counter()
    fits = LogisticRegression(split.train, split.labels, args.classes, make_mesh(-1, 1), args.dtype).fit(cs)
    seconds = time.perf_counter() - began
    _say(f"ours: {len(cs)} values of C in {seconds:.1f} s, {int(fits.converged.sum())} of them converged")
    return fits, seconds


def _theirs(
    make: Callable[[float], Any], cs: list[float], split: ProbeData, name: str
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """(objective, test accuracy) of scikit-learn for each C, and its seconds, iterations and accuracies."""
    found, times, iterations = [], [], []
    for c in cs:
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the iteration limit: the numbers of iterations are reported
            fit = make(c).fit(split.train, split.labels)
        times.append(time.perf_counter() - began)
        iterations.append(int(fit.n_iter_[0]))
        found.append(judge(split, c, *sklearn_weights(fit)))
        _say(f"scikit-learn, tol={fit.tol:g}: C={c:g} in {times[-1]:.1f} s, {iterations[-1]} iterations")
    report = {
        "seconds": timing.round_significant(sum(times), 4),
        "iterations": iterations,
        "accuracy": [accuracy for _, accuracy in found],
    }
    return found, {f"sklearn_{name}{key}": value for key, value in report.items()}


def judge(split: ProbeData, c: float, weights: np.ndarray, bias: np.ndarray) -> tuple[float, float]:
    """Objective on the training examples, and accuracy in percent on the test examples, of weights (D, K)."""
    right = (split.test @ weights + bias).argmax(1) == split.test_labels
    return objective(split.train, split.labels, weights, bias, c), 100 * float(right.mean())


def _machine() -> dict[str, Any]:
    import sklearn

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "sklearn": sklearn.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    } | timing.cpu_hardware()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
