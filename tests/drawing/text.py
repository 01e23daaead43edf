"""The text side: two tokenizers of a few dozen words, and two small encoders made for short training.

The pipeline pads T5's tokens to 512 and masks nothing. Here each head of T5 looks at exactly one neighbour,
at most three words away, so all paddings except the first few get the same output. The transformer gives all
text the same position. So one padding can stand for all of them if log(count) is added to its attention
logit. Training sees `TOKENS` tokens and the pipeline 512, with the same result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.drawing.pictures import COLOURS, PLACES, SHAPES

WIDTH = 64
"""Width of both encoders' outputs."""

TOKENS = 20
"""T5's tokens in training; the last one stands for the paddings up to `_PADDED`."""

_PADDED = 512
_CLIP_TOKENS = 32
_REACH = 3
"""How many words away the heads of T5 look at most."""

_FAR = -1e4

_OTHERS = "a an the background with make change to turn into it picture photo image drawing of in middle and"

WORDS = sorted({*COLOURS, *SHAPES, *" ".join(PLACES).split(), *_OTHERS.split()})


@dataclass(slots=True)
class TextSide:
    """Both tokenizers and both encoders."""

    clip_tokenizer: CLIPTokenizer
    clip: CLIPTextModel
    t5_tokenizer: T5Tokenizer
    t5: T5EncoderModel

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return T5's tokens [count, TOKENS, WIDTH] and CLIP's pooled vectors [count, WIDTH]."""
        ids = [
            tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer, length in ((self.t5_tokenizer, TOKENS), (self.clip_tokenizer, _CLIP_TOKENS))
        ]
        return self.t5(ids[0])[0], self.clip(ids[1]).pooler_output

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return what training may change."""
        return [p for model in (self.clip, self.t5) for p in model.parameters() if p.requires_grad]


def make_text_side(seed: int) -> TextSide:
    """Return the text side with random weights."""
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPTextModel(_clip_config(clip_tokenizer))
        t5 = T5EncoderModel(_t5_config(t5_tokenizer))
    block: Any = t5.encoder.block[0]
    attention = block.layer[0].SelfAttention
    with torch.no_grad():
        # Without queries the position alone decides where a head looks.
        attention.q.weight.zero_()
        bias = attention.relative_attention_bias.weight
        bias.fill_(_FAR)
        for head, offset in enumerate(range(-_REACH, _REACH + 1)):
            bias[0, head] = _FAR / 2  # At either end, where there is no such neighbour, it looks at itself.
            bias[abs(offset) + (8 if offset > 0 else 0), head] = 0.0
    for parameter in (attention.q.weight, attention.k.weight, bias):
        parameter.requires_grad_(False)
    return TextSide(clip_tokenizer, clip.eval(), t5_tokenizer, t5.eval())


def padding_bias(images: int) -> Tensor:
    """Return what is added to attention's logits, for so many image tokens after the text."""
    bias = torch.zeros(1, 1, 1, TOKENS + images)
    bias[..., TOKENS - 1] = math.log(_PADDED - TOKENS + 1)
    return bias


def _t5_config(tokenizer: T5Tokenizer) -> T5Config:
    settings: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1}
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=2 * _REACH + 1,
        # Eight buckets in either direction, of which the first four are for single words.
        relative_attention_num_buckets=16,
        relative_attention_max_distance=5,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **settings,
    )


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    specials: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        **specials,
    )


def _t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer of whole words; it knows the case, so each word is in it twice."""
    words = [f"\u2581{word}" for word in WORDS + [word.capitalize() for word in WORDS]]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = specials + [(word, -1.0) for word in [*words, ",", "."]] + [("\u2581", -2.0)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=_PADDED)


def _clip_tokenizer() -> CLIPTokenizer:
    """Return a byte-level tokenizer that merges the letters of each known word into one token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, show_progress=False, end_of_word_suffix="</w>")
    trained.train_from_iterator(WORDS, trainer)
    merges: list[list[str]] = json.loads(trained.to_str())["model"]["merges"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: id for id, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    pairs: Any = [tuple(pair) for pair in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)
