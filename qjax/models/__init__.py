"""Models to quantize, read from Hugging Face folders without torch: decoders, BERT, image classifiers."""

from qjax._guard import only_inside_qjax

only_inside_qjax(__name__)

from qjax.models.bert import Bert, BertConfig, TextEncoder, sentence_embedding
from qjax.models.config import LlamaConfig
from qjax.models.decoder import init_cache
from qjax.models.efficientnet import EfficientNet, EfficientNetClassifier, EfficientNetConfig
from qjax.models.functional import fuse, stack_layers, unstack_layers
from qjax.models.gpt2 import Gpt2, Gpt2Config
from qjax.models.hf import abstract, load, read_config, save_weights
from qjax.models.imagenet_resnet import ResNet, ResNetClassifier, ResNetConfig
from qjax.models.images import ImageProcessor, image_processor
from qjax.models.language import LanguageModel, generate, stream
from qjax.models.llama import Llama
from qjax.models.mobilenet import MobileNetV2, MobileNetV2Classifier, MobileNetV2Config
from qjax.models.moe import Moe, MoeConfig
from qjax.models.opt import Opt, OptConfig
from qjax.models.resnet import CifarClassifier, CifarResNet, CifarResNetConfig
from qjax.models.rope import RopeScaling
from qjax.models.swin import Swin, SwinClassifier, SwinConfig
from qjax.models.text import Tokenizer, tokenizer
from qjax.models.vit import ImageClassifier, Vit, VitConfig

__all__ = [
    "Bert",
    "BertConfig",
    "CifarClassifier",
    "CifarResNet",
    "CifarResNetConfig",
    "EfficientNet",
    "EfficientNetClassifier",
    "EfficientNetConfig",
    "Gpt2",
    "Gpt2Config",
    "ImageClassifier",
    "ImageProcessor",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
    "MobileNetV2",
    "MobileNetV2Classifier",
    "MobileNetV2Config",
    "Moe",
    "MoeConfig",
    "Opt",
    "OptConfig",
    "ResNet",
    "ResNetClassifier",
    "ResNetConfig",
    "RopeScaling",
    "Swin",
    "SwinClassifier",
    "SwinConfig",
    "TextEncoder",
    "Tokenizer",
    "Vit",
    "VitConfig",
    "abstract",
    "fuse",
    "generate",
    "image_processor",
    "init_cache",
    "load",
    "read_config",
    "save_weights",
    "sentence_embedding",
    "stack_layers",
    "stream",
    "tokenizer",
    "unstack_layers",
]
