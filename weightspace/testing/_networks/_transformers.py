"""Cases from the ``transformers`` package: tiny configurations, random weights, nothing downloaded.

Half of them attend with products and softmax written out (``eager``), half with PyTorch's fused attention
(``sdpa``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from weightspace.testing._networks._case import case, token_ids

VOCABULARY = 13
POSITIONS = 7
# Special tokens lie outside most tiny vocabularies by default.
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": VOCABULARY, **SPECIAL}


def _ids(batch: int, length: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": token_ids(VOCABULARY, batch, length)}


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _pixels(batch: int, height: int, width: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": _randn(batch, 3, height, width)}


def _sentences(batch: int, length: int) -> Callable[[], dict[str, Tensor]]:
    """Tokens of two kinds, with the last place of the first row padded."""

    def draw() -> dict[str, Tensor]:
        kinds = (torch.arange(length) > length // 2).long().expand(batch, length).clone()
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, -1] = 0
        ids = token_ids(VOCABULARY, batch, length)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}

    return draw


def _built(model: Any, config: Any, attention: str) -> nn.Module:
    module: nn.Module = model._from_config(config, attn_implementation=attention)
    return module


@case(_sentences(3, POSITIONS), _sentences(4, 5), family="transformers", outputs=("logits",))
def hf_bert() -> nn.Module:
    """BERT with its masked language model head, tied; some places padded."""
    config = transformers.BertConfig(
        **TEXT,
        hidden_size=15,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=POSITIONS,
    )
    return _built(transformers.BertForMaskedLM, config, "eager")


@case(_ids(3, POSITIONS), _ids(4, 5), family="transformers", outputs=("logits",))
def hf_distilbert() -> nn.Module:
    """DistilBERT as a classifier, which reads the first place only."""
    config = transformers.DistilBertConfig(
        **TEXT, dim=15, n_layers=2, n_heads=3, hidden_dim=17, max_position_embeddings=POSITIONS, num_labels=4
    )
    return _built(transformers.DistilBertForSequenceClassification, config, "sdpa")


@case(_ids(3, POSITIONS), _ids(4, 5), family="transformers", outputs=("logits",))
def hf_gpt2() -> nn.Module:
    """GPT-2 language model: tied embeddings, weights stored transposed (Conv1D), fused projection."""
    config = transformers.GPT2Config(
        **TEXT, n_positions=POSITIONS, n_embd=15, n_layer=2, n_head=3, n_inner=17, use_cache=False
    )
    return _built(transformers.GPT2LMHeadModel, config, "sdpa")


@case(_ids(3, POSITIONS), _ids(4, 5), family="transformers", outputs=("logits",))
def hf_opt() -> nn.Module:
    """OPT language model: positions counted from the mask, two rows of their table unused."""
    config = transformers.OPTConfig(
        **TEXT,
        hidden_size=15,
        num_hidden_layers=2,
        ffn_dim=17,
        num_attention_heads=3,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=8,
        use_cache=False,
    )
    return _built(transformers.OPTForCausalLM, config, "eager")


@case(_ids(3, 7), _ids(4, 5), family="transformers", outputs=("logits",))
def hf_llama() -> nn.Module:
    """Llama language model: rotary positions, grouped queries, gated perceptrons."""
    config = transformers.LlamaConfig(
        **TEXT,
        hidden_size=18,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=16,
        use_cache=False,
    )
    return _built(transformers.LlamaForCausalLM, config, "sdpa")


@case(_ids(3, 7), _ids(4, 5), family="transformers", outputs=("logits",))
def hf_qwen2() -> nn.Module:
    """Qwen2 language model: as Llama, with biases on queries, keys and values, and tied embeddings."""
    config = transformers.Qwen2Config(
        **TEXT,
        hidden_size=24,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return _built(transformers.Qwen2ForCausalLM, config, "eager")


@case(_ids(3, 7), _ids(4, 5), family="transformers", outputs=("logits",))
def hf_gpt_neox() -> nn.Module:
    """GPT-NeoX language model: partial rotary positions, fused projection within heads, parallel branches."""
    config = transformers.GPTNeoXConfig(
        **TEXT,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=17,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        use_cache=False,
    )
    return _built(transformers.GPTNeoXForCausalLM, config, "sdpa")


def _pairs(batch: int, length: int, target: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "input_ids": token_ids(VOCABULARY, batch, length),
        "decoder_input_ids": token_ids(VOCABULARY, batch, target),
    }


@case(_pairs(3, 8, 7), _pairs(4, 5, 6), family="transformers", outputs=("logits",))
def hf_t5() -> nn.Module:
    """T5 with its language model head: a bias by relative position that all layers share."""
    config = transformers.T5Config(
        **SPECIAL,
        vocab_size=VOCABULARY,
        d_model=14,
        d_kv=5,
        d_ff=17,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=6,
        relative_attention_max_distance=6,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return _built(transformers.T5ForConditionalGeneration, config, "eager")


def _speech(batch: int, target: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "input_features": _randn(batch, 6, 20),
        "decoder_input_ids": token_ids(VOCABULARY, batch, target),
    }


@case(_speech(3, POSITIONS), _speech(4, 5), family="transformers", outputs=("logits",))
def hf_whisper() -> nn.Module:
    """Whisper: convolutions over a spectrogram of fixed length, encoder, decoder."""
    config = transformers.WhisperConfig(
        **TEXT,
        pad_token_id=0,
        num_mel_bins=6,
        d_model=18,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=17,
        decoder_ffn_dim=16,
        max_source_positions=10,
        max_target_positions=POSITIONS,
        decoder_start_token_id=1,
        use_cache=False,
    )
    return _built(transformers.WhisperForConditionalGeneration, config, "sdpa")


@case(_pixels(2, 8, 12), _pixels(5, 8, 12), family="transformers", outputs=("logits",))
def hf_vit() -> nn.Module:
    """Vision transformer as a classifier: separate projections, class token."""
    config = transformers.ViTConfig(
        hidden_size=15,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=17,
        image_size=(8, 12),
        patch_size=4,
        num_labels=4,
    )
    return _built(transformers.ViTForImageClassification, config, "eager")


def _images_and_texts(images: int, texts: int, length: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "input_ids": token_ids(VOCABULARY, texts, length),
        "pixel_values": _randn(images, 3, 8, 8),
    }


@case(
    _images_and_texts(2, 3, POSITIONS),
    _images_and_texts(5, 4, 6),
    family="transformers",
    outputs=("logits_per_image", "logits_per_text"),
)
def hf_clip() -> nn.Module:
    """CLIP: two encoders whose last axes meet in one product of normalised vectors."""
    text = {
        **TEXT,
        "hidden_size": 15,
        "intermediate_size": 17,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "max_position_embeddings": POSITIONS,
    }
    vision = {
        "hidden_size": 14,
        "intermediate_size": 18,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=11)
    return _built(transformers.CLIPModel, config, "sdpa")


@case(_pixels(2, 16, 16), _pixels(3, 24, 32), family="transformers", outputs=("logits",))
def hf_convnext() -> nn.Module:
    """ConvNeXt as a classifier."""
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[7, 9], depths=[2, 1], num_labels=4)
    return _built(transformers.ConvNextForImageClassification, config, "eager")


@case(_pixels(2, 32, 32), _pixels(3, 48, 40), family="transformers", outputs=("logits",))
def hf_resnet() -> nn.Module:
    """ResNet as a classifier, with bottlenecks."""
    config = transformers.ResNetConfig(
        embedding_size=6, hidden_sizes=[12, 20, 28], depths=[2, 1, 1], num_labels=4
    )
    return _built(transformers.ResNetForImageClassification, config, "eager")


@case(_pixels(2, 16, 16), _pixels(3, 32, 16), family="transformers", outputs=("logits",))
def hf_swin() -> nn.Module:
    """Swin as a classifier: shifted windows, position bias by table, merged patches."""
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=10,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=1.5,
        num_labels=3,
    )
    return _built(transformers.SwinForImageClassification, config, "eager")


@case(_pixels(2, 16, 16), _pixels(3, 24, 32), family="transformers", outputs=("logits",))
def hf_segformer() -> nn.Module:
    """SegFormer: keys and values from a shrunken image, depthwise convolution in the perceptron, fused scales."""
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[10, 14],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[2, 2],
        mlp_ratios=[2, 3],
        decoder_hidden_size=11,
        num_labels=4,
    )
    return _built(transformers.SegformerForSemanticSegmentation, config, "eager")


@case(_pixels(2, 32, 32), _pixels(3, 48, 32), family="transformers", outputs=("logits",))
def hf_mobilenet_v2() -> nn.Module:
    """MobileNetV2 as a classifier, all its layers, with TensorFlow's padding."""
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.2, depth_divisible_by=1, min_depth=2, num_labels=4, finegrained_output=False
    )
    return _built(transformers.MobileNetV2ForImageClassification, config, "eager")
