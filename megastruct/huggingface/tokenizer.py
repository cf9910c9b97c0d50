"""The tokenizer of a run for transformers: tokenizer.json with the same ids for every text.

A tokenizer.json is written as it is, except that its special tokens are those that the run has. A SentencePiece model
is converted: it must be a BPE model that takes text unchanged and falls back to bytes, as LLaMA's and those of
tools/train_tokenizer.py do. Whether the ids are the same is compared on a sample of texts, and a difference is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from megastruct.data import Tokenizer
from megastruct.data.tokenizers.file import FileTokenizer
from megastruct.data.tokenizers.hugging_face import HuggingFaceTokenizer
from megastruct.data.tokenizers.sentence_piece import SentencePieceTokenizer
from megastruct.errors import Problem, UserError

SPACE = "\u2581"  # how SentencePiece writes a space

SAMPLE = (
    "The quick brown fox jumps over the lazy dog. It's 3.14159 or 1,000,000 -- isn't it?",
    "def f(x):\n    if x > 0:\n\t\treturn [i ** 2 for i in range(x)]  # squares\n\n\nprint(f(10))\n",
    '{"key": [1, 2, null], "url": "https://example.com/a?b=c&d=%20"}',
    " one leading space",
    "    four leading spaces and two behind  ",
    "\n\nlines\r\nof   three   spaces\t\ttabs\n",
    " ",
    "   ",
    "\n",
    "",
    "aaaaaaaaaaaaaaaaaaaaa bbbbbbbbbb abababababab lalalala hahahahahahaha",
    "</s> <s> <unk> inside</s>of text <0x41>",
    f"{SPACE} a{SPACE}b {SPACE}{SPACE}c",
    "\x00 nul \x7f del \u00a0 no-break\u200bzero-width \ufeff mark",
    "naïve façade Ångström e\u0301 \u0308 ﬁ ½ …",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते",
    "日本語のテキスト。中文文本,한국어 텍스트。",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 \U0001f600\U0001f600 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "CamelCaseWords snake_case_words UPPER lower 0123456789 ٠١٢٣",
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    `max_length`: tokens of the model's context.

    Raises:
        UserError: the tokenizer is of a kind that gives other ids in transformers, or the library is missing.
        OSError: a file cannot be written.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content, unknown = _with_special_tokens(tokenizer), tokenizer.json.unknown
    elif isinstance(tokenizer, SentencePieceTokenizer):
        content, unknown = _convert(tokenizer).to_str(pretty=True), _unknown(tokenizer)
    else:
        found = f"a {type(tokenizer).__name__}, but only SentencePiece models and tokenizer.json can be exported"
        raise UserError(Problem(str(tokenizer.path), found, "--tokenizer tokenizer.model"))
    if (text := _first_difference(tokenizer, tokenizers.Tokenizer.from_str(content))) is not None:
        found = f"transformers would give other ids, for example for {text[:40]!r}"
        advice = "export a run with a tokenizer.json of byte-level BPE"
        if isinstance(tokenizer, SentencePieceTokenizer):
            found += "; only BPE models that take text unchanged and fall back to bytes can be exported"
            advice = "train a tokenizer with tools/train_tokenizer.py"
        raise UserError(Problem(str(tokenizer.path), found, advice))
    eod = tokenizer.options.eod_token
    special = {"bos_token": tokenizer.options.bos_token or eod, "eos_token": eod, "pad_token": eod}
    special |= {"unk_token": unknown} if unknown is not None else {}
    settings = {
        # LlamaTokenizer would give other ids for lines that begin with spaces.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "split_special_tokens": True,  # otherwise "</s>" inside of a text would end the document
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids otherwise
    }
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


def _with_special_tokens(tokenizer: HuggingFaceTokenizer) -> str:
    """The tokenizer.json in which the tokens that are made of no text are the special ones."""
    values = tokenizer.json.changed(tokenizer.hidden, tokenizer.options.bos_token or None)
    return json.dumps(values, indent=1, ensure_ascii=False)


def _convert(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    processor = tokenizer.processor
    pieces = processor.id_to_piece(list(range(tokenizer.vocab_size)))
    ids = {piece: index for index, piece in enumerate(pieces)}
    special = [piece for piece, i in ids.items() if processor.is_control(i) or processor.is_unknown(i)]
    model: Any = models.BPE(
        ids, _merges(tokenizer, ids), unk_token=_unknown(tokenizer), fuse_unk=True, byte_fallback=_has_bytes(tokenizer)
    )
    converted = tokenizers.Tokenizer(model)
    converted.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    converted.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    converted.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in special])
    if tokenizer.bos_id is not None:
        bos = processor.id_to_piece(tokenizer.bos_id)
        converted.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
    return converted


def _merges(tokenizer: SentencePieceTokenizer, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every division of a piece into two pieces, in the order in which SentencePiece merges: by the piece's score."""
    processor = tokenizer.processor
    ordinary = [
        (piece, index)
        for piece, index in ids.items()
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))
    ]
    ordinary.sort(key=lambda item: -processor.get_score(item[1]))
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in ordinary
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]


def _first_difference(tokenizer: FileTokenizer, converted: tokenizers.Tokenizer) -> str | None:
    """The first text whose ids differ, or which is decoded differently."""
    converted.encode_special_tokens = True  # what `split_special_tokens` sets
    texts = [*SAMPLE, " ".join(SAMPLE), *(piece.replace(SPACE, " ") for piece in tokenizer.pieces())]
    for text, wanted in zip(texts, tokenizer.encode(texts), strict=True):
        ids = converted.encode(text, add_special_tokens=False).ids
        if ids != wanted.tolist() or converted.decode(ids) != tokenizer.decode(ids):
            return text
    return None


def _unknown(tokenizer: SentencePieceTokenizer) -> str:
    return tokenizer.processor.id_to_piece(tokenizer.processor.unk_id())


def _has_bytes(tokenizer: SentencePieceTokenizer) -> bool:
    return any(tokenizer.processor.is_byte(index) for index in range(tokenizer.vocab_size))
