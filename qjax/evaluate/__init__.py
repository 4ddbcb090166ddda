"""How good a model is, and how far a quantized one is from its float original.

``perplexity``, ``divergence`` and ``accuracy`` take any callable ``fn(params, inputs) -> logits``; nothing here knows
of quantization. Perplexity is too flat to rank methods: read KL divergence and top-1 agreement beside it.
"""

from qjax.evaluate.images import Accuracy, LabelledImages, accuracy, read_images
from qjax.evaluate.language import Divergence, Perplexity, divergence, logit_divergence, perplexity
from qjax.evaluate.metrics import recovery, sqnr_db
from qjax.evaluate.paired import Estimate, Paired, estimate, paired_test
from qjax.evaluate.progress import track
from qjax.evaluate.sentences import sentence_pairs
from qjax.evaluate.tasks import ImageTask, SentenceTask, TextTask
from qjax.evaluate.text import TextBlocks, read_text, text_blocks

__all__ = [
    "Accuracy",
    "Divergence",
    "Estimate",
    "ImageTask",
    "LabelledImages",
    "Paired",
    "Perplexity",
    "SentenceTask",
    "TextBlocks",
    "TextTask",
    "accuracy",
    "divergence",
    "estimate",
    "logit_divergence",
    "paired_test",
    "perplexity",
    "read_images",
    "read_text",
    "recovery",
    "sentence_pairs",
    "sqnr_db",
    "text_blocks",
    "track",
]
