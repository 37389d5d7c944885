"""Runs whose figures are made up, and hang together: for whatever reads results and no network."""

import numpy as np

from megajax.evaluation.predictions import from_logits
from megajax.evaluation.robustness import agreement

ACCURACY = {
    "parent_0": 0.70,
    "parent_1": 0.74,
    "uniform_average": 0.30,
    "random_search": 0.76,
    "ensemble": 0.90,
    "merged": 0.82,
}
CORRUPTIONS = ("shot_noise", "contrast")


def planted_run(seed=0, images=400, classes=5, accuracy=ACCURACY):
    """`results.json` and predictions of a run whose networks have about these test accuracies."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images).astype(np.int32)
    hard = rng.random(images)  # what one network gets wrong, others tend to get wrong too
    logits, entries, robust, scores = {}, {}, {}, []
    for key, share in accuracy.items():
        wrong = 0.7 * hard + 0.3 * rng.random(images) > np.quantile(hard, share)
        classes_of = np.where(wrong, (labels + 1) % classes, labels)
        logits[key] = 3 * np.eye(classes)[classes_of]
        right = classes_of == labels
        table = {
            name: [float(0.9 * right.mean()), float(0.8 * right.mean())] for name in CORRUPTIONS
        }
        scores.append(0.85 * right)
        robust[key] = {"accuracy": table, "mean_corruption_accuracy": float(0.85 * right.mean())}
        entries[key] = {
            "validation_accuracy": round((share + 0.01) * 200) / 200,
            "validation_nll": 1.0,
            "test_accuracy": float(right.mean()),
            "test_nll": 2 * (1 - share) + 0.01 * seed,
            "calibration_error": 0.05,
            "per_class_accuracy": [float(right[labels == c].mean()) for c in range(classes)],
        }
    predictions = from_logits(
        logits, labels, np.arange(images), np.stack(scores).astype(np.float32)
    )
    for entry, of_one in zip(entries.values(), predictions.classes, strict=True):
        entry["agreement"] = [agreement(of_one, predictions.classes[k]) for k in range(2)]
    entries["random_search"]["evaluations"] = 96
    points = [{"accuracy": a, "nll": 2 - a} for a in (0.7, 0.2, 0.74)]
    results = {
        "parents": [entries.pop("parent_0"), entries.pop("parent_1")],
        "merged": entries.pop("merged"),
        "baselines": entries,
        "seed": seed,
        "evaluations": 96,
        "generations": 5,
        "metric": "cross_entropy",
        "data": {"name": "planted", "train": 1000, "validation": 200, "test": images},
        "seconds": {"training": 1.0, "search": 2.5},
        "path": {
            "shares": [0.0, 0.5, 1.0],
            "lines": {"as they are": points},
            "merged": {"share": 0.6, "accuracy": 0.8, "nll": 0.9},
        },
        "robustness": {"networks": robust, "severities": [1, 5], "examples": images},
    }
    return results, predictions


def history(generations=5):
    """Lines of `metrics.jsonl`; the worst of a generation may have had no finite fitness."""
    return [
        {
            "generation": g,
            "best_ever": -1 / (1 + g),
            "best": -1 / (1 + g),
            "median": -1.5 / (1 + g),
            "worst": None if g == 2 else -3.0,
        }
        for g in range(generations + 1)
    ]


SHARES = {
    "conv1": np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]),
    "block/conv2": np.array([[1.0, 0.0], [0.0, 1.0]]),
    "head": [0.25, 0.75],
}
