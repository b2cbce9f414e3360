"""A classifier on the sentence embedding that a sentence-transformers model was trained to make.

transformers' own classifiers read a pooler or the first token, which such a model was never trained to use:
before they are trained, what they read says little about a text.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput

from .base import Pooling
from .model_files import read_json, read_pooling
from .settings import MODULES, SENTENCES


class SentenceClassifier(transformers.PreTrainedModel):
    """`logits = classifier(pooled)`, where `pooled` `[batch, hidden]` is the encoder's sentence embedding.

    Its modules are named as in the encoder's own `…ForSequenceClassification`, so that a LoRA fits both.

    Args:
        encoder: returns `last_hidden_state`.
        pooling: of that over the tokens, and whether the result is normalized.
    """

    # The attention is the encoder's, which was loaded with one that it supports.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, encoder: Any, pooling: Pooling) -> None:
        super().__init__(encoder.config)
        self.base_model_prefix = encoder.base_model_prefix
        self.mode, self.normalize = pooling.mode, pooling.normalize
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # nothing reads it
        self.add_module(self.base_model_prefix, encoder)
        self.classifier = torch.nn.Linear(encoder.config.hidden_size, encoder.config.num_labels)
        torch.nn.init.normal_(self.classifier.weight, std=getattr(self.config, "initializer_range", 0.02))
        torch.nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Logits float32 `[batch, labels]` and, with `labels`, the loss; arguments are the encoder's."""
        if token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        encoder = getattr(self, self.base_model_prefix)
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        mask = torch.ones_like(hidden[..., :1])
        if attention_mask is not None:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        if self.mode == "mean":
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        elif self.mode == "max":
            pooled = hidden.masked_fill(mask == 0, -1e9).max(1).values
        else:
            pooled = hidden[:, 0]
        if self.normalize:
            pooled = torch.nn.functional.normalize(pooled)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = ForSequenceClassificationLoss(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def is_sentence_encoder(model: str) -> bool:
    """Whether a folder or hub id is a sentence-transformers model: an encoder without a classifier, which its
    cross-encoders have."""
    task = (read_json(model, SENTENCES) or {}).get("transformer_task")
    return read_json(model, MODULES, list) is not None and task != "sequence-classification"


def load_sentence_classifier(model: str, labels: Sequence[str]) -> SentenceClassifier:
    """A sentence-transformers model with a new classifier, float32, in evaluation mode.

    An adapter that was trained on the device opens on it: `PeftModel.from_pretrained(classifier, adapter)`.

    Args:
        model: a folder or hub id.
        labels: names of the classes.

    Raises:
        ExportError: the model pools in a way that edgepeft does not know.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    config = transformers.AutoConfig.from_pretrained(
        model, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=numbers
    )
    encoder = transformers.AutoModel.from_pretrained(model, config=config, dtype=torch.float32)
    classifier = SentenceClassifier(encoder, read_pooling(model))
    classifier.train(False)
    return classifier
