"""Models to quantize: Llama-family decoders and vision transformers, read from Hugging Face folders without torch."""

from qjax._guard import only_inside_qjax

only_inside_qjax(__name__)

from qjax.models.config import LlamaConfig
from qjax.models.decoder import init_cache
from qjax.models.functional import stack_layers, unstack_layers
from qjax.models.hf import abstract, load, read_config, save_weights
from qjax.models.images import ImageProcessor, image_processor
from qjax.models.language import LanguageModel, generate, stream
from qjax.models.llama import Llama
from qjax.models.resnet import CifarClassifier, CifarResNet, CifarResNetConfig
from qjax.models.rope import RopeScaling
from qjax.models.text import Tokenizer, tokenizer
from qjax.models.vit import ImageClassifier, Vit, VitConfig

__all__ = [
    "CifarClassifier",
    "CifarResNet",
    "CifarResNetConfig",
    "ImageClassifier",
    "ImageProcessor",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "Tokenizer",
    "Vit",
    "VitConfig",
    "abstract",
    "generate",
    "image_processor",
    "init_cache",
    "load",
    "read_config",
    "save_weights",
    "stack_layers",
    "stream",
    "tokenizer",
    "unstack_layers",
]
