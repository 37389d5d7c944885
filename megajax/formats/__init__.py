"""Networks from anywhere, and back: Flax msgpack, Orbax, safetensors, npz, PyTorch's state dicts.

`load_parents` and `export` are the two ends; what lies between them:

    loading     load_network, load_parents, map_names     saving      save_network, export, the card
    naming      which array becomes which leaf            mapping     what a match is
    state_dict  PyTorch's modules and our layers          ordering    the modules' order
    uses        what the program does with each leaf      layouts     the rule table
    kinds       the formats, one file each                arrays      pytrees, files as named arrays
    disk        sums, whole writes                        adapters    Flax models as functions
"""

from megajax.formats.adapters import Network as Network
from megajax.formats.adapters import from_linen as from_linen
from megajax.formats.adapters import from_nnx as from_nnx
from megajax.formats.adapters import to_nnx as to_nnx
from megajax.formats.disk import fingerprint as fingerprint
from megajax.formats.kinds import FORMATS as FORMATS
from megajax.formats.loading import check_logits as check_logits
from megajax.formats.loading import load_network as load_network
from megajax.formats.loading import load_parents as load_parents
from megajax.formats.loading import map_names as map_names
from megajax.formats.mapping import NameMap as NameMap
from megajax.formats.saving import export as export
from megajax.formats.saving import model_card as model_card
from megajax.formats.saving import save_network as save_network
