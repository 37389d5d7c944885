"""Two small convolutional networks, trained on class-skewed halves of the digits, merged.

    python -m megajax.run --config experiments/digits.py

Parent 0 sees mostly even digits, parent 1 mostly odd ones. Bundled data, no network needed.
"""

from ml_collections import ConfigDict

from megajax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "digits"
    config.data.validation_fraction = 0.3
    config.model.name = "cnn"
    config.parents.shards = "skewed"
    config.parents.skew = 0.95
    return config
