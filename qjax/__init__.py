"""qjax: quantization of any JAX function, as a transformation of its program.

The names below are the public interface. They are looked up when first used (PEP 562), so that ``import qjax`` and
``qjax --help`` take milliseconds and only what a program uses is imported.

``qjax.recipe`` is the function that makes a named preset; the module of the same name is reached as
``from qjax.recipe import ...``. That module is imported here first and without jax, because a submodule's first
import sets the package's attribute of that name: done here, the function has the last word.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qjax.recipe import Recipe, Rule, recipe, recipes
from qjax.sources import dynamic, ema, fixed, learned, static

if TYPE_CHECKING:
    from qjax import checkpoint as checkpoint
    from qjax import errors as errors
    from qjax import evaluate as evaluate
    from qjax import formats as formats
    from qjax import hardware as hardware
    from qjax import models as models
    from qjax import passes as passes
    from qjax import search as search
    from qjax import supernet as supernet
    from qjax import testing as testing
    from qjax.adapters import from_equinox as from_equinox
    from qjax.adapters import from_linen as from_linen
    from qjax.adapters import from_nnx as from_nnx
    from qjax.calibration import MSE as MSE
    from qjax.calibration import AbsMax as AbsMax
    from qjax.calibration import MaxMin as MaxMin
    from qjax.calibration import MinMax as MinMax
    from qjax.calibration import Percentile as Percentile
    from qjax.checkpoint import load as load
    from qjax.checkpoint import save as save
    from qjax.formats import MXFP4 as MXFP4
    from qjax.formats import MXFP8 as MXFP8
    from qjax.formats import NF4 as NF4
    from qjax.formats import NVFP4 as NVFP4
    from qjax.formats import Float8 as Float8
    from qjax.formats import Int as Int
    from qjax.formats import QArray as QArray
    from qjax.formats import QStack as QStack
    from qjax.formats import register_format as register_format
    from qjax.lazy import Lazy as Lazy
    from qjax.low_rank import lora as lora
    from qjax.observed import calibrate as calibrate
    from qjax.observed import observe as observe
    from qjax.ops import quantize_cache as quantize_cache
    from qjax.ops import register_lowering as register_lowering
    from qjax.passes import AWQ as AWQ
    from qjax.passes import DGQ as DGQ
    from qjax.passes import GPTQ as GPTQ
    from qjax.passes import HQQ as HQQ
    from qjax.passes import PTQTP as PTQTP
    from qjax.passes import RTN as RTN
    from qjax.passes import AutoRound as AutoRound
    from qjax.passes import BiasCorrection as BiasCorrection
    from qjax.passes import QoQ as QoQ
    from qjax.passes import Rotated as Rotated
    from qjax.passes import SparseGPT as SparseGPT
    from qjax.passes import TwoBit as TwoBit
    from qjax.program import Program as Program
    from qjax.program import trace as trace
    from qjax.studies import study as study
    from qjax.supernet.elastic import elastic as elastic
    from qjax.training import fake_quant as fake_quant
    from qjax.transforms import Model as Model
    from qjax.transforms import plan as plan
    from qjax.transforms import quantize as quantize
    from qjax.trees import astype as astype
    from qjax.trees import check_trainable as check_trainable
    from qjax.trees import combine as combine
    from qjax.trees import partition as partition

__version__ = "0.1.0"

# Public name -> the module it lives in.
_HOME = {
    "trace": "qjax.program",
    "Program": "qjax.program",
    "quantize": "qjax.transforms",
    "plan": "qjax.transforms",
    "Model": "qjax.transforms",
    "fake_quant": "qjax.training",
    "lora": "qjax.low_rank",
    "study": "qjax.studies",
    "elastic": "qjax.supernet.elastic",
    "observe": "qjax.observed",
    "calibrate": "qjax.observed",
    "from_nnx": "qjax.adapters",
    "from_linen": "qjax.adapters",
    "from_equinox": "qjax.adapters",
    "partition": "qjax.trees",
    "combine": "qjax.trees",
    "astype": "qjax.trees",
    "check_trainable": "qjax.trees",
    "save": "qjax.checkpoint",
    "load": "qjax.checkpoint",
    "Int": "qjax.formats",
    "Float8": "qjax.formats",
    "NF4": "qjax.formats",
    "MXFP4": "qjax.formats",
    "MXFP8": "qjax.formats",
    "NVFP4": "qjax.formats",
    "QArray": "qjax.formats",
    "QStack": "qjax.formats",
    "register_format": "qjax.formats",
    "quantize_cache": "qjax.ops",
    "register_lowering": "qjax.ops",
    "RTN": "qjax.passes",
    "AutoRound": "qjax.passes",
    "AWQ": "qjax.passes",
    "BiasCorrection": "qjax.passes",
    "GPTQ": "qjax.passes",
    "Rotated": "qjax.passes",
    "TwoBit": "qjax.passes",
    "DGQ": "qjax.passes",
    "QoQ": "qjax.passes",
    "PTQTP": "qjax.passes",
    "HQQ": "qjax.passes",
    "SparseGPT": "qjax.passes",
    "Lazy": "qjax.lazy",
    "AbsMax": "qjax.calibration",
    "MaxMin": "qjax.calibration",
    "MinMax": "qjax.calibration",
    "Percentile": "qjax.calibration",
    "MSE": "qjax.calibration",
}
_SUBMODULES = (
    "checkpoint",
    "errors",
    "evaluate",
    "formats",
    "hardware",
    "models",
    "passes",
    "search",
    "supernet",
    "testing",
)

__all__ = [
    "AWQ",
    "DGQ",
    "GPTQ",
    "HQQ",
    "MSE",
    "MXFP4",
    "MXFP8",
    "NF4",
    "NVFP4",
    "PTQTP",
    "RTN",
    "AbsMax",
    "AutoRound",
    "BiasCorrection",
    "Float8",
    "Int",
    "Lazy",
    "MaxMin",
    "MinMax",
    "Model",
    "Percentile",
    "Program",
    "QArray",
    "QStack",
    "QoQ",
    "Recipe",
    "Rotated",
    "Rule",
    "SparseGPT",
    "TwoBit",
    "astype",
    "calibrate",
    "check_trainable",
    "checkpoint",
    "combine",
    "dynamic",
    "elastic",
    "ema",
    "errors",
    "evaluate",
    "fake_quant",
    "fixed",
    "formats",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "hardware",
    "learned",
    "load",
    "lora",
    "models",
    "observe",
    "partition",
    "passes",
    "plan",
    "quantize",
    "quantize_cache",
    "recipe",
    "recipes",
    "register_format",
    "register_lowering",
    "save",
    "search",
    "static",
    "study",
    "supernet",
    "testing",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import the home of a public name on its first use; an unknown name is an AttributeError."""
    home = f"qjax.{name}" if name in _SUBMODULES else _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'qjax' has no attribute {name!r}")
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:  # a dependency of that module is missing: its own message says which
            raise
        raise AttributeError(f"qjax.{name} lives in the module {home}, which this installation lacks") from error
    value = module if name in _SUBMODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
