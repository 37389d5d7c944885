"""How long symmetry discovery and weight matching take.

    python benchmarks/symmetries.py

Discovery traces a network and never runs it; matching permutes one random network's hidden units to
lie close to another's. Seconds of one call each, and whether a planted permutation was undone.
"""

import time

import jax
import numpy as np

import megajax as mj
from megajax.alignment import find_symmetries, permute, random_permutations
from megajax.program.roles import find_statistics
from megajax.trees import leaf_paths
from megajax.zoo import networks as models

NETWORKS = [
    ("resnet", {"depth": 20}, True),
    ("resnet", {"depth": 56}, True),
    ("resnet", {"depth": 152}, False),
    ("densenet", {"depth": 169}, False),
]


def main() -> None:
    """Prints the table."""
    images = np.zeros((2, 32, 32, 3), np.float32)
    print(f"{'network':<14}{'groups':>8}{'discovery [s]':>15}{'matching [s]':>14}{'planted':>10}")
    for name, options, match in NETWORKS:
        model = models.build(name, 10, options)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        apply_fn = mj.from_linen(model, {}, train=False).apply_fn
        start = time.perf_counter()
        symmetries = find_symmetries(apply_fn, shapes, images)
        line = f"{name}-{options['depth']}"
        line = f"{line:<14}{len(symmetries.groups):>8}{time.perf_counter() - start:>15.2f}"
        if match:
            init = jax.jit(model.init)
            first, second = (jax.device_get(init(jax.random.key(k), images)) for k in (0, 1))
            found = find_statistics(apply_fn, first, images)
            ignore = {leaf_paths(first)[i] for s in found for i in (s.mean, s.variance)}
            start = time.perf_counter()
            match(jax.random.key(0), symmetries, [first, second], ignore=ignore)
            line += f"{time.perf_counter() - start:>14.2f}"
            shuffled = permute(
                symmetries, random_permutations(jax.random.key(2), symmetries), first
            )
            (_, back), _ = match(jax.random.key(0), symmetries, [first, shuffled], ignore=ignore)
            pairs = zip(jax.tree.leaves(first), jax.tree.leaves(back), strict=True)
            line += f"{'exact' if all(np.array_equal(a, b) for a, b in pairs) else 'no':>10}"
        print(line)


if __name__ == "__main__":
    main()
