"""Tokenizers of the kinds that LLMs have, trained on a few sentences.

SentencePiece's byte-pair encoding with a blank before the first word (LLaMA), and byte-level pairs
without one (GPT-2, Phi, Qwen).
"""

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from moresjax.data.samples import IMAGE_MARK

VISUAL = 4
CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the image? ASSISTANT: A cat on a mat.\n",
    "How many dogs are there? Two dogs, one of them brown.",
)


def sentencepiece(bos: bool) -> PreTrainedTokenizerFast:
    """A blank before the first word, bytes for what is unknown, and BOS if wanted."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no pair across words
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes as letters, no blank before the first word, no BOS; end and beginning are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


KINDS = {
    "sentencepiece with bos": sentencepiece(bos=True),
    "sentencepiece without bos": sentencepiece(bos=False),
    "byte level": byte_level(),
}


def reference_ids(tokenizer, text: str) -> list[int | None]:
    """LLaVA's: the text between two images is tokenised by itself, BOS once; None is an image."""
    ids = tokenizer("").input_ids
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        ids += [None] * VISUAL * bool(number)
        ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids
