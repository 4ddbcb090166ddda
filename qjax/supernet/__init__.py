"""Elastic quantization supernets (EQ-Net): one set of weights that runs in every form of a space.

The pieces are plain functions for any training script: the quantizer `lsq_plus` and its `init_steps`, the losses
`wdr_loss` and `gpg_loss`, and `sample_choice` over the `Domain` of a `Space`.
"""

from qjax.supernet.choices import encode_choice, sample_choice
from qjax.supernet.elastic import Supernet, elastic
from qjax.supernet.losses import gpg_loss, gpg_terms, moments, wdr_loss
from qjax.supernet.quantizer import code_range, init_steps, lsq_plus, step_grad_scale
from qjax.supernet.sampling import Descending, Fixed, Sampler, Sandwich
from qjax.supernet.saved import load_trained
from qjax.supernet.sizes import Sizes, compression, sizes
from qjax.supernet.space import At, Domain, Space
from qjax.supernet.training import Schedule, Trained, make_step, recalibrate, train

__all__ = [
    "At",
    "Descending",
    "Domain",
    "Fixed",
    "Sampler",
    "Sandwich",
    "Schedule",
    "Sizes",
    "Space",
    "Supernet",
    "Trained",
    "code_range",
    "compression",
    "elastic",
    "encode_choice",
    "gpg_loss",
    "gpg_terms",
    "init_steps",
    "load_trained",
    "lsq_plus",
    "make_step",
    "moments",
    "recalibrate",
    "sample_choice",
    "sizes",
    "step_grad_scale",
    "train",
    "wdr_loss",
]
