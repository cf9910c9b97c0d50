"""A model that reads a prompt once and then one token after the other, with a key/value cache.

It runs the modules of a GPT on one process, in whatever form its linears have; only the attention to the cache is its
own. On a GPU a step is compiled and replayed as a CUDA graph: a step of few tokens starts hundreds of small kernels,
and the host would be slower at that than the GPU at computing them.

Letters: b rows, s tokens of the longest prompt, h hidden size, dh head width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megastruct.config.schema import Config
from megastruct.inference.cache import KeyValueCache
from megastruct.layers.vocabulary import VocabParallelEmbedding
from megastruct.models.block import COMPILED_VARIANTS, Block
from megastruct.models.gpt import EMBEDDING, GPT, HEAD

if torch.cuda.is_available():
    from megastruct.inference import decode_kernel  # Triton is installed with a PyTorch for GPUs only


class Decoder:
    """A GPT on one process, with a cache. `compiled`: compile the steps; None: on a GPU."""

    def __init__(self, model: GPT, config: Config, compiled: bool | None = None) -> None:
        self.model, self.config = model, config
        embedding = cast(VocabParallelEmbedding, model.get_submodule(EMBEDDING))
        self.device, self.dtype = embedding.weight.device, embedding.weight.dtype
        self.blocks = [cast(Block, block) for block in model.blocks.children()]
        self.compiled = self.device.type == "cuda" if compiled is None else compiled
        self._step_block: Callable[..., Tensor] = step_block
        if self.compiled:
            torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
            # The first number of rows is compiled as a constant: with a variable one, the GPU's loads are narrower, and
            # a large step is up to a fifth slower. A second number is compiled as a variable.
            self._step_block = torch.compile(step_block, fullgraph=True)
        self._graph: _Graph | None = None

    def new_cache(self, batch: int, num_slots: int) -> KeyValueCache:
        """An empty cache for `batch` rows of up to `num_slots` tokens, on the model's device.

        With compiled steps a decoder works on its newest cache only: a graph holds the addresses of one cache.
        """
        self._graph = None
        return KeyValueCache(self.config.model, batch, num_slots, self.dtype, self.device)

    @torch.inference_mode()
    def read_prompts(self, prompts: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
        """Read prompts of any lengths, at least 1, into an empty cache -> logits [b, v] of the token after each."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        # What follows a shorter prompt is read too; as attention is causal, it changes nothing before it.
        x: Tensor = self.model.get_submodule(EMBEDDING)(ids.to(self.device))  # [s, b, h]
        for layer, block in enumerate(self.blocks):
            attention = block.attention
            normed = block.attention_norm(x)
            q, k, v = attention.project(normed, *attention.rotary.tables(longest, self.device))
            cache.write_prompt(layer, k, v)
            x = x + attention.attend(q, k, v)
            x = x + block.mlp(block.mlp_norm(x))
        last = torch.tensor([len(prompt) - 1 for prompt in prompts]).to(self.device)
        return self._logits(x[last, torch.arange(len(prompts), device=self.device)][None])

    @torch.inference_mode()
    def step(self, ids: Tensor, lengths: Sequence[int], cache: KeyValueCache) -> Tensor:
        """Read one more token of each row: ids int64 [b] -> logits [b, v] of the next.

        `lengths`: tokens that each row has in the cache already; they are at least 1 and below `cache.num_slots`. The
        result is overwritten by the next step if steps are compiled.
        """
        positions = torch.tensor(lengths).to(self.device, non_blocking=True)
        if self.compiled:
            if self._graph is None:
                self._graph = _Graph(partial(self._run, cache=cache), (ids, positions))
            return self._graph(ids, positions)
        longest = max(lengths) + 1
        mask = None if min(lengths) + 1 == longest else _mask(positions, longest)
        return self._run(ids, positions, cache, longest, mask)

    def _run(
        self, ids: Tensor, positions: Tensor, cache: KeyValueCache, slots: int = 0, mask: Tensor | None = None
    ) -> Tensor:
        x: Tensor = self.model.get_submodule(EMBEDDING)(ids[:, None])  # [1, b, h]
        cos, sin = self.blocks[0].attention.rotary.tables(cache.num_slots, self.device)
        cos, sin = (table[positions].view(1, len(ids), 1, -1) for table in (cos, sin))
        rows = torch.arange(len(ids), device=self.device)
        for block, keys, values in zip(self.blocks, cache.keys.unbind(), cache.values.unbind(), strict=True):
            if self.compiled:
                for cached in (keys, values):
                    torch._dynamo.maybe_mark_dynamic(cached, 2)
            x = self._step_block(block, x, cos, sin, keys, values, rows, positions, slots, mask)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        """[1, b, h] -> [b, v]."""
        x = self.model.get_submodule("final_norm")(x)
        if self.model.tied:
            return cast(VocabParallelEmbedding, self.model.get_submodule(EMBEDDING)).project(x)[0]
        return self.model.get_submodule(HEAD)(x)[0]


class _Graph:
    """A function of tensors of fixed shapes, captured as a CUDA graph; its result is overwritten by the next call."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> None:
        self.inputs = [argument.clone() for argument in arguments]
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and makes what is made once; it writes to the cache what the replay writes
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph, stream=stream):
            self.output = function(*self.inputs)

    def __call__(self, *arguments: Tensor) -> Tensor:
        for own, argument in zip(self.inputs, arguments, strict=True):
            own.copy_(argument, non_blocking=True)
        self.graph.replay()
        return self.output


def step_block(
    block: Block,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    positions: Tensor,
    slots: int,
    mask: Tensor | None,
) -> Tensor:
    """One token of each row through a block: x [1, b, h] -> [1, b, h].

    keys, values: the block's part of the cache [b, kv_heads, num_slots, dh], to which the tokens are added at
    `positions` int64 [b]. `rows`: 0 ... b - 1. cos and sin: [1, b, 1, dh / 2]. `slots`, `mask`: as
    in `attend_to_cache`.
    """
    attention = block.attention
    q, k, v = attention.project(block.attention_norm(x), cos, sin)
    keys[rows, :, positions] = k[0]
    values[rows, :, positions] = v[0]
    y = attend_to_cache(q[0], keys, values, positions, slots, mask)
    x = x + attention.out(y.reshape(1, len(rows), -1))
    return x + block.mlp(block.mlp_norm(x))


def attend_to_cache(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: int, mask: Tensor | None
) -> Tensor:
    """Attention of q [b, heads, dh] to the slots 0 ... `positions` int64 [b] of each row; b x heads x dh values.

    keys, values: [b, kv_heads, num_slots, dh]. A CPU reads the first `slots` slots, of which `mask` bool
    [b, 1, 1, slots] says what each row sees; None: all of them. A GPU's kernel needs neither.
    """
    if q.is_cuda:
        return decode_kernel.attend(q, keys, values, positions)
    # The query heads of a key/value head stand side by side, as if they were positions: nothing is copied for them.
    grouped = q.view(*keys.shape[:2], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, keys[:, :, :slots], values[:, :, :slots], attn_mask=mask)


def _mask(positions: Tensor, slots: int) -> Tensor:
    """Which of the first `slots` slots a token at `positions` int64 [b] sees: bool [b, 1, 1, slots]."""
    return (torch.arange(slots, device=positions.device) <= positions[:, None])[:, None, None]
