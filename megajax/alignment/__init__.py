"""Permutation symmetries of networks, and the alignment of independently trained ones."""

from megajax.alignment.aligning import AlignConfig as AlignConfig
from megajax.alignment.aligning import align as align
from megajax.alignment.matching import Alignment as Alignment
from megajax.alignment.matching import activation_matching as activation_matching
from megajax.alignment.matching import weight_matching as weight_matching
from megajax.alignment.symmetries import Copies as Copies
from megajax.alignment.symmetries import Group as Group
from megajax.alignment.symmetries import Permutations as Permutations
from megajax.alignment.symmetries import Pinned as Pinned
from megajax.alignment.symmetries import Site as Site
from megajax.alignment.symmetries import Symmetries as Symmetries
from megajax.alignment.symmetries import compose as compose
from megajax.alignment.symmetries import find_symmetries as find_symmetries
from megajax.alignment.symmetries import identity_permutations as identity_permutations
from megajax.alignment.symmetries import invert_permutations as invert_permutations
from megajax.alignment.symmetries import permute as permute
from megajax.alignment.symmetries import random_permutations as random_permutations
from megajax.alignment.symmetries import validate as validate
from megajax.alignment.symmetries import verify as verify
from megajax.alignment.units import unit_labels as unit_labels
