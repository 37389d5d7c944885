"""Networks from anywhere, and back: Flax msgpack, Orbax, safetensors, npz, PyTorch's state dicts.

networks    load_network, load_parents, save_network       export      the same, with a card
matching    which array becomes which leaf                 state_dict  PyTorch's modules
search      the order of modules, from their names         uses        what leaves are for
layouts     the rule table                                 trees       pytrees as named arrays
msgpack, npz, orbax, safetensors    one format each        files       checksums, whole writes
"""

from megajax.interchange.export import export as export
from megajax.interchange.export import model_card as model_card
from megajax.interchange.files import fingerprint as fingerprint
from megajax.interchange.mapping import NameMap as NameMap
from megajax.interchange.networks import FORMATS as FORMATS
from megajax.interchange.networks import check_logits as check_logits
from megajax.interchange.networks import load_network as load_network
from megajax.interchange.networks import load_parents as load_parents
from megajax.interchange.networks import map_names as map_names
from megajax.interchange.networks import save_network as save_network
