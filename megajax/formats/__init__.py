"""Networks from anywhere, and back: Flax msgpack, Orbax, safetensors, npz, PyTorch's state dicts.

`load_parents` and `export` are the two ends; what lies between them:

    networks    load_network, load_parents, save_network       exporting   the same, with a card
    matching    which array becomes which leaf                 mapping     what a match is
    state_dict  PyTorch's modules and our layers               search      the modules' order
    uses        what the program does with each leaf           layouts     the rule table
    trees       pytrees as named arrays                        files       sums, whole writes
    msgpack, npz, orbax, safetensors    one format each
"""

from megajax.formats.exporting import export as export
from megajax.formats.exporting import model_card as model_card
from megajax.formats.files import fingerprint as fingerprint
from megajax.formats.mapping import NameMap as NameMap
from megajax.formats.networks import FORMATS as FORMATS
from megajax.formats.networks import check_logits as check_logits
from megajax.formats.networks import load_network as load_network
from megajax.formats.networks import load_parents as load_parents
from megajax.formats.networks import map_names as map_names
from megajax.formats.networks import save_network as save_network
