"""The demo checkpoint's two tokenizers and text encoders: CLIP and T5 as in FLUX.1, of two layers each."""

from __future__ import annotations

import json
import math
import random
import re
import string
from collections import Counter
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from demo_checkpoint import scenes

MAX_TOKENS = 32
"""Tokens of a prompt, padding included, for both encoders; longer prompts are cut."""
WIDTH = 128
"""The hidden size of both encoders."""

_ALPHABET = string.ascii_letters + string.digits + ".,:;!?'\"-()"


@dataclass(frozen=True, kw_only=True)
class Tokenizers:
    """Both tokenizers, as FluxPipeline uses them."""

    clip: CLIPTokenizer
    """For the pooled embedding; `tokenizer` of the pipeline."""
    t5: T5TokenizerFast
    """For the token embeddings; `tokenizer_2` of the pipeline."""

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the CLIP and the T5 token ids, each (B, MAX_TOKENS)."""
        padded = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        return self.clip(prompts, **padded).input_ids, self.t5(prompts, **padded).input_ids


def train_tokenizers(seed: int) -> Tokenizers:
    """Train both tokenizers on the captions of random scenes; a word of the captions is one token."""
    rng = random.Random(f"captions {seed}")
    captions = [scenes.caption(scene, rng) for scene in scenes.random_scenes(4000, seed, held_out=False)]
    return Tokenizers(clip=_train_clip_tokenizer(captions), t5=_make_t5_tokenizer(captions))


def _train_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    template = CLIPTokenizer()
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = template.backend_tokenizer.normalizer
    bpe.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=1024,
        min_frequency=10,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator([*captions, *(" ".join(_ALPHABET.lower()) for _ in range(10))], trainer)
    vocabulary = bpe.get_vocab()
    # Every letter also once at the end of a word, so that no word is unknown. The trainer numbers these differently in
    # every process: sorted, a resumed training meets the tokens it knows.
    letters = sorted(letter + "</w>" for letter in pre_tokenizers.ByteLevel.alphabet())
    numbers = sorted(vocabulary.pop(letter) for letter in letters if letter in vocabulary)
    numbers += range(len(vocabulary) + len(numbers), len(vocabulary) + len(letters))
    vocabulary.update(zip(letters, numbers, strict=True))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _make_t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """Make a unigram vocabulary of the captions' words, lower case and capitalised, and of single letters.

    Not by the library's trainer: on so few words it prunes most of them to syllables.
    """
    counts = Counter(re.findall(r"[a-z]+", " ".join(captions).lower()))
    total = counts.total()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    for word, count in sorted(counts.items()):
        score = math.log(count / total)
        pieces += [("▁" + word, score), ("▁" + word.capitalize(), score - 1)]
    known = {piece for piece, _ in pieces}
    letters = [prefix + letter for letter in _ALPHABET for prefix in ("", "▁")]
    pieces += [(letter, -12.0) for letter in letters if letter not in known]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def build_clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained encoder that makes the pooled embedding (B, WIDTH)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Build the untrained encoder that makes the token embeddings (B, MAX_TOKENS, WIDTH)."""
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    nn.init.normal_(model.shared.weight, std=0.5)
    return model
