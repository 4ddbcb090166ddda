"""Number formats and the packed arrays that hold them."""

from qjax.formats import export as _export  # noqa: F401 (registers the serialization of quantized arrays)
from qjax.formats.affine import Affine
from qjax.formats.base import Aux, Format
from qjax.formats.code_tiles import CodeTiles
from qjax.formats.dual_grained import DualGrained
from qjax.formats.float8 import Float8
from qjax.formats.integer import Int
from qjax.formats.kv4 import KV4
from qjax.formats.layout import Layout
from qjax.formats.log import Log
from qjax.formats.mixed_bits import MixedBits
from qjax.formats.mixed_tiles import MixedTiles
from qjax.formats.mx import MXFP4, MXFP8
from qjax.formats.nf4 import NF4
from qjax.formats.nvfp4 import NVFP4
from qjax.formats.packing import pack_bits, unpack_bits
from qjax.formats.progressive import Progressive
from qjax.formats.qarray import QArray, assemble, canonical_matrix, quantize_array
from qjax.formats.qstack import QStack, is_quantized, stack_slices
from qjax.formats.registry import format_from_dict, formats, get, register_format
from qjax.formats.rotation import SIGNS, SMOOTH
from qjax.formats.sparse24 import Sparse24
from qjax.formats.trit_planes import TritPlanes
from qjax.formats.trit_tiles import TritTiles
from qjax.formats.twin import TwinUniform
from qjax.formats.views import concatenate, stack
from qjax.formats.word_tiles import WordTiles

__all__ = [
    "KV4",
    "MXFP4",
    "MXFP8",
    "NF4",
    "NVFP4",
    "SIGNS",
    "SMOOTH",
    "Affine",
    "Aux",
    "CodeTiles",
    "DualGrained",
    "Float8",
    "Format",
    "Int",
    "Layout",
    "Log",
    "MixedBits",
    "MixedTiles",
    "Progressive",
    "QArray",
    "QStack",
    "Sparse24",
    "TritPlanes",
    "TritTiles",
    "TwinUniform",
    "WordTiles",
    "assemble",
    "canonical_matrix",
    "concatenate",
    "format_from_dict",
    "formats",
    "get",
    "is_quantized",
    "pack_bits",
    "quantize_array",
    "register_format",
    "stack",
    "stack_slices",
    "unpack_bits",
]
