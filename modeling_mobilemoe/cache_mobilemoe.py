"""A layer of `DynamicCache` that holds keys and values of one sequence in the blocks that the kernels read.

A block has 64 positions of one head: keys `(D, 64)`, then values `(64, D)`, in FP32 or BF16; in INT8 as
`kernels/src/cache.h` describes.
"""

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer


# Positions of a block.
CACHE_BLOCK = 64
CACHE_BITS = {"fp32": 32, "bf16": 16, "int8": 8}


def empty_cache(num_heads: int, head_dim: int, length: int, kind: str) -> torch.Tensor:
    """
    Memory for keys and values of a layer, as `mobilemoe::update_cache` and `mobilemoe::attention` take it.

    Args:
        num_heads (`int`): of keys.
        head_dim (`int`): a multiple of 16.
        length (`int`): positions, rounded up to whole blocks.
        kind (`str`): `"fp32"`, `"bf16"`, or `"int8"` with a step for every head and position, of keys and of values.

    Returns:
        Bytes of shape `(num_heads, blocks, bytes of a block)`. The operators tell the kind by the last.
    """
    block_bytes = 2 * CACHE_BLOCK * (head_dim * CACHE_BITS[kind] // 8 + (4 if kind == "int8" else 0))
    return torch.zeros(num_heads, -(-length // CACHE_BLOCK), block_bytes, dtype=torch.uint8)


class BlockLayer(DynamicLayer):
    """
    BF16 keys and values of one sequence: in blocks while one operator runs a whole layer, and in tensors as soon as
    anything else reads or changes them. Both hold the same numbers.

    Args:
        plain (`DynamicLayer`): whose keys and values it takes over.
        num_heads (`int`): of keys.
        head_dim (`int`): a multiple of 16.
    """

    def __init__(self, plain: DynamicLayer, num_heads: int, head_dim: int):
        self.blocks: torch.Tensor | None = None
        self.length = 0
        self.num_heads = num_heads
        self.head_dim = head_dim
        super().__init__()
        self.keys, self.values = plain.keys, plain.values
        self.is_initialized = plain.is_initialized
        self.device = torch.device("cpu")

    @property
    def keys(self) -> torch.Tensor | None:  # ty: ignore[invalid-attribute-override]
        self._to_tensors()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._to_tensors()
        self._keys = keys

    @property
    def values(self) -> torch.Tensor | None:  # ty: ignore[invalid-attribute-override]
        self._to_tensors()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._to_tensors()
        self._values = values

    def extend(self, num_tokens: int) -> tuple[torch.Tensor, int]:
        """
        Makes room for more positions, which the caller then writes.

        Returns:
            The blocks, and the number of positions before.
        """
        start = self.get_seq_length()
        end = start + num_tokens
        if self.blocks is None or self.blocks.shape[1] * CACHE_BLOCK < end:
            # By half at a time, so that a position is copied a few times only.
            blocks = empty_cache(self.num_heads, self.head_dim, max(end, start * 3 // 2), "bf16")
            if self.blocks is not None:
                blocks[:, : self.blocks.shape[1]] = self.blocks
            elif start:
                keys, values = parts(blocks, self.head_dim)
                for part, states in ((keys.transpose(2, 3), self._keys), (values, self._values)):
                    padding = -start % CACHE_BLOCK
                    padded = nn.functional.pad(states[0], (0, 0, 0, padding)).unflatten(1, (-1, CACHE_BLOCK))
                    part[:, : padded.shape[1]] = padded
            self._keys = self._values = None
            self.blocks = blocks
            self.is_initialized = True
        self.length = end
        return self.blocks, start

    def _to_tensors(self) -> None:
        if self.blocks is None:
            return
        keys, values = parts(self.blocks, self.head_dim)
        self._keys, self._values = (
            # (1, heads, positions, D)
            part.flatten(1, 2)[None, :, : self.length].contiguous()
            for part in (keys.transpose(2, 3), values)
        )
        self.blocks = None

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.blocks is None else self.length

    def crop(self, tokens_to_remove: int) -> None:
        if self.blocks is None or tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            self.length = max(0, self.length + tokens_to_remove)


def parts(blocks: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `(heads, blocks, D, 64)` and values `(heads, blocks, 64, D)` of BF16 blocks, in their memory."""
    keys, values = blocks.view(torch.bfloat16).chunk(2, dim=-1)
    return keys.unflatten(-1, (head_dim, CACHE_BLOCK)), values.unflatten(-1, (CACHE_BLOCK, head_dim))
