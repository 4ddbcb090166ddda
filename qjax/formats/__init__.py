"""Number formats and the packed arrays that hold them."""

from qjax.formats.base import Aux, Format
from qjax.formats.integer import Int
from qjax.formats.layout import Layout
from qjax.formats.packing import pack_bits, unpack_bits
from qjax.formats.qarray import QArray, assemble, canonical_matrix, quantize_array
from qjax.formats.registry import format_from_dict, formats, get, register_format
from qjax.formats.views import concatenate, stack

__all__ = [
    "Aux",
    "Format",
    "Int",
    "Layout",
    "QArray",
    "assemble",
    "canonical_matrix",
    "concatenate",
    "format_from_dict",
    "formats",
    "get",
    "pack_bits",
    "quantize_array",
    "register_format",
    "stack",
    "unpack_bits",
]
