"""Tiny tokenizers of the kinds that people have, as folders that transformers and this project open."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tiny_data import NUM_SHARDS, WORDS, make_texts

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CODE = ["def f(x):\n    return x", "if x:\n        y = [1, 2]\n", "It's 12345 o'clock, don't you'll we've."] * 10
LINES = [text for shard in range(NUM_SHARDS) for text in make_texts(shard) if text] + CODE

SPECIAL = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<|im_start|>",
    "</s>",
    "<s>",
    "<unk>",
    "<|eot_id|>",
]
MARKUP = ["<tool_call>", "<|fim_prefix|>"]
TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "river stone light",
    " river  stone   light    garden\n\nwinter\t\tletter \n market\r\n  silver ",
    "def f(x):\n    if x > 0:\n\t\treturn [i ** 2 for i in range(x)]  # squares\n\n\nprint(f(10))\n",
    "It's 3.14159 or 1,000,000 -- ISN'T it? don't you'll we've 12345 1 22 333 4444",
    "unmerged words unmerged",
    "e\u0301 \u0301 a\u0308\u0323 \ufb01 \u00bd \u1100\u1161\u11a8 \u212b",
    "\x00 nul \x7f \u00a0 no-break\u200bzero \ufeff \x1c \x1f\x85 \u2028 \u3000 wide",
    "日本語のテキスト。中文文本,한국어 🙂 👩‍👩‍👧‍👦 🇩🇪 𝔘𝔫𝔦",
    "Привет, мир! שלום עולם مرحبا नमस्ते",
    "a\u2581b \u2581 c \ufffd",
    "\n".join(f"{' ' * indent}x = {indent}" for indent in range(40)),
    *(f"inside{token}of {token} text{token}" for token in [*SPECIAL, *MARKUP]),
]


def train_json(special, normalizer=None, split=None, vocab_size=400):
    """Byte-level BPE; `split`: the expression of its own, in place of GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def gpt2():
    return train_json(["<|endoftext|>"]), {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}


def gpt_neox():
    """With added tokens of runs of spaces, which are made of text."""
    tokenizer = train_json(["<|endoftext|>", "<|padding|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    return tokenizer, {"eos_token": "<|endoftext|>"}


def llama3():
    """Special tokens beyond the base vocabulary, whole words before merges, and a token before every text."""
    tokenizer = train_json([], split=SPLIT)
    values = json.loads(tokenizer.to_str())
    values["model"]["ignore_merges"] = True
    words = values["model"]["vocab"]
    words["Ġunmerged"] = len(words)
    tokenizer = Tokenizer.from_str(json.dumps(values))
    begin = "<|begin_of_text|>"
    tokenizer.add_special_tokens([begin, "<|end_of_text|>", "<|eot_id|>"])
    template = processors.TemplateProcessing(
        f"{begin} $A", f"{begin} $A {begin} $B", [(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer, {"eos_token": "<|end_of_text|>", "bos_token": begin}


def qwen():
    """NFC, and added tokens that are markup but not special."""
    tokenizer = train_json([], normalizers.NFC(), SPLIT.replace("{1,3}", ""))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<|fim_prefix|>", normalized=False)])
    return tokenizer, {"eos_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}


def llama2():
    """As converted from SentencePiece: the whole text is one word, and unknown characters are bytes."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for line in LINES for letter in line if letter not in " \n"} | {"\u2581"})
    words = {token: index for index, token in enumerate([*tokens, *letters])}
    merges = []
    for word in [f"\u2581{word}" for word in WORDS if word.isascii()]:
        for cut in range(1, len(word)):
            if word[: cut + 1] not in words:
                words[word[: cut + 1]] = len(words)
                merges.append((word[:cut], word[cut]))
    tokenizer = Tokenizer(models.BPE(words, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True}


KINDS = {"gpt2": gpt2, "gpt_neox": gpt_neox, "llama3": llama3, "qwen": qwen, "llama2": llama2}


def write_folder(folder, kind):
    """A folder as it is downloaded: tokenizer.json and tokenizer_config.json."""
    tokenizer, config = KINDS[kind]()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
