"""Exchange of weights with the field's own mixers: their modules into our layers, and back.

layer = exchange.from_mixer(model.backbone.layers[0].mixer)    # a GatedLinearAttention
state = exchange.dump(layer, "transformers.mamba2")            # for mixer.load_state_dict
"""

from glazoo.converters.exchange.maps import KINDS, Entry, KeyMap
from glazoo.converters.exchange.transfer import dump, from_mixer, kind_of, load

__all__ = ["KINDS", "Entry", "KeyMap", "dump", "from_mixer", "kind_of", "load"]
