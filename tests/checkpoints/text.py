"""Tiny text encoders and tokenizers of real classes, with random weights; the tokenizers are made from a few sentences.

A tokenizer trained from nothing: byte-level BPE for CLIP, Qwen, LLaMA and GLM, Unigram for the T5s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SENTENCES = (
    "a red circle above a blue star on a gray ground",
    "the small green square stands left of a large yellow triangle",
    "two black cats sleep under an old wooden table",
    "a lighthouse at dusk, waves break on the rocks",
    "blurry, dark, low quality",
)
WIDTH = 32
CLIP_TOKENS = 20
T5_TOKENS = 48


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP of two layers."""
    return CLIPTextModel(_clip_config(tokenizer, WIDTH))


def make_projected_clip(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextModelWithProjection:
    """A CLIP of two layers, its pooled embedding projected: SDXL, Stable Diffusion 3."""
    return CLIPTextModelWithProjection(_clip_config(tokenizer, width))


def _clip_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=10.0,
    )


def make_t5(tokenizer: T5TokenizerFast, width: int = WIDTH) -> T5EncoderModel:
    """A T5 of two layers."""
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=16,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    nn.init.normal_(encoder.shared.weight, std=1.0)
    return encoder


def train_clip_tokenizer() -> CLIPTokenizer:
    """As CLIP's: lower case, an end of word, CLIP_TOKENS at most."""
    template = CLIPTokenizer()
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = template.backend_tokenizer.normalizer
    bpe.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=600,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    vocabulary = bpe.get_vocab()
    for letter in alphabet:
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_TOKENS)


def make_t5_tokenizer() -> T5TokenizerFast:
    """As T5's: pieces with a mark in front of words, T5_TOKENS at most."""
    words = sorted(set(re.findall(r"[a-z]+", " ".join(SENTENCES))))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -5.0) for word in words if len(word) > 1]
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces += [(prefix + letter, -12.0) for letter in letters for prefix in ("", "▁")]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def train_byte_bpe(
    special_tokens: Sequence[str],
    *,
    sentences: Sequence[str] = (),
    vocab_size: int = 400,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
) -> Tokenizer:
    """A byte-level BPE as Qwen, LLaMA 3 and GLM have it, for `PreTrainedTokenizerFast(tokenizer_object=...)` and kin.

    sentences: more than SENTENCES, such as a template that must not fall into single letters. pre_tokenizer: in place
    of one that parts words alone.
    """
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    bpe.train_from_iterator([*SENTENCES, *sentences], trainer)
    return bpe
