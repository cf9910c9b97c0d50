"""Sixth floor: folders for the library transformers, and first weights from such folders.

stock.py           which class of transformers holds a model exactly
merged.py          the tensors of that class, from a model whose structured linears are multiplied out
structured.py      the factors as they are, with modeling_megastruct.py
tokenizer.py       tokenizer.json for the tokenizer of a run
card.py            README.md, filled from the run folder
export.py          writes a whole folder, or nothing

source.py          reads the config and the weights of such a folder
first_weights.py   the weights of a run, projected to its structure
first_checkpoint.py      the checkpoint that the run starts from
"""
