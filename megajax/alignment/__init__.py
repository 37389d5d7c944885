"""Permutation symmetries of networks, and the alignment of independently trained ones."""

from megajax.alignment.matching import Alignment as Alignment
from megajax.alignment.matching import activation_matching as activation_matching
from megajax.alignment.matching import match as match
from megajax.alignment.matching import weight_matching as weight_matching
from megajax.alignment.permutations import Permutations as Permutations
from megajax.alignment.permutations import compose as compose
from megajax.alignment.permutations import identity_permutations as identity_permutations
from megajax.alignment.permutations import permute as permute
from megajax.alignment.permutations import random_permutations as random_permutations
from megajax.alignment.permutations import validate as validate
from megajax.alignment.symmetries import Copies as Copies
from megajax.alignment.symmetries import Group as Group
from megajax.alignment.symmetries import Pinned as Pinned
from megajax.alignment.symmetries import Site as Site
from megajax.alignment.symmetries import Symmetries as Symmetries
from megajax.alignment.symmetries import find_symmetries as find_symmetries
from megajax.alignment.units import unit_labels as unit_labels
from megajax.alignment.verification import verify as verify
from megajax.alignment.workflow import AlignConfig as AlignConfig
from megajax.alignment.workflow import align as align
