"""From a text file to blocks of tokens, and from blocks to a few batch shapes.

Two protocols say which tokens are scored and what stands in front of each.

Protocol A: blank lines separate the pieces of the text (stories, articles). Each is tokenised alone, gets the
beginning-of-text token in front, and is cut to the context length in all. Every token but that first one is scored.

Protocol B: the whole text is tokenised without special tokens and cut into consecutive blocks of one less than the
context length; the rest is dropped. Each block gets the beginning-of-text token in front and is scored whole.

With a tokenizer that has no beginning-of-text token, the first token of each block stands in its place: it is read and
not scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import DataError

PROTOCOLS = ("A", "B")
MAX_CONTEXT = 2048
"""Context length that is used where a model's own is longer: logits of a whole block must fit in memory."""
MAX_SHAPES = 4
"""Batch shapes per text, each compiled once."""
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True)
class Batch:
    """Rows of equal padded length.

    Attributes:
        inputs: int32 [B, T], what the model reads; padding is behind the text, where a causal model cannot see it.
        targets: int32 [B, T], the token after each.
        mask: bool [B, T], true where the target is scored.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class TextBlocks:
    """Token blocks of a text: the first token of each is read only, the others are scored.

    ``len`` is the number of blocks; iterating and indexing give their ids.

    Attributes:
        blocks: int32 arrays [n >= 2].
        protocol: "A", "B", or "ids" for blocks that were given as ids.
        context: most tokens of a block.
    """

    blocks: tuple[np.ndarray, ...]
    protocol: str
    context: int

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.blocks)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.blocks[row]

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return sum(len(b) - 1 for b in self.blocks)

    @property
    def top(self) -> int:
        """Highest token id."""
        return int(max(b.max() for b in self.blocks))

    def first(self, count: int | None) -> TextBlocks:
        """The first `count` blocks; all of them for None."""
        return TextBlocks(self.blocks[:count], self.protocol, self.context)

    def only(self, rows: Sequence[int]) -> TextBlocks:
        """The blocks of these numbers."""
        return TextBlocks(tuple(self.blocks[row] for row in rows), self.protocol, self.context)

    def batches(self, tokens_per_batch: int) -> tuple[Batch, ...]:
        """Pad blocks of similar length together: at most `MAX_SHAPES` shapes, most padding avoided.

        Args:
            tokens_per_batch: bound on B * T; a block that is longer makes a batch of its own.
        """
        lengths = np.array([len(b) - 1 for b in self.blocks])
        # Multiples of 16 vectorise better, and coarse steps keep the search below small.
        step = max(16, self.context // 64)
        padded = np.minimum(-(-lengths // step) * step, max(self.context, lengths.max()))
        out = []
        low = 0
        for high in bucket_ends(padded, MAX_SHAPES):
            members = np.flatnonzero((padded > low) & (padded <= high))
            rows = max(1, tokens_per_batch // high)
            rows = -(-len(members) // -(-len(members) // rows))  # spread evenly: the last batch is not left thin
            for start in range(0, len(members), rows):
                out.append(self._batch(members[start : start + rows], rows, high))
            low = high
        return tuple(out)

    def _batch(self, members: np.ndarray, rows: int, length: int) -> Batch:
        inputs, targets = np.zeros((2, rows, length), np.int32)
        mask = np.zeros((rows, length), bool)
        for row, k in enumerate(members):
            block = self.blocks[k]
            inputs[row, : len(block) - 1], targets[row, : len(block) - 1] = block[:-1], block[1:]
            mask[row, : len(block) - 1] = True
        return Batch(inputs, targets, mask)


def bucket_ends(lengths: np.ndarray, most: int, least: float | None = None) -> tuple[int, ...]:
    """Choose at most `most` padded lengths that add the fewest padding tokens, by dynamic programming.

    Args:
        lengths: positive integers [n].
        most: number of buckets; fewer are returned where one more would save less than ``least``.
        least: tokens that a bucket has to save; None is 3 % of all.

    Returns:
        Ascending bucket lengths; the last is the longest of `lengths`.
    """
    values, counts = np.unique(lengths, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(counts)])
    n = len(values)
    # cost[j]: fewest tokens for the first j values in k buckets; cut[k][j]: where the last of them begins.
    cost = np.array([0.0] + [float(upto[j] * values[j - 1]) for j in range(1, n + 1)])
    cuts = [np.zeros(n + 1, int)]
    totals = [cost[n]]
    for _ in range(1, min(most, n)):
        best = np.full(n + 1, np.inf)
        best[0] = 0.0
        cut = np.zeros(n + 1, int)
        for j in range(1, n + 1):
            options = cost[:j] + (upto[j] - upto[:j]) * float(values[j - 1])
            cut[j] = int(np.argmin(options))
            best[j] = options[cut[j]]
        cost = best
        cuts.append(cut)
        totals.append(cost[n])
    useful = 0.03 * float((values * counts).sum()) if least is None else least
    k = 0
    while k + 1 < len(totals) and totals[k] - totals[k + 1] > useful:
        k += 1
    ends, j = [], n
    for cut in reversed(cuts[: k + 1]):
        if j > 0:
            ends.append(int(values[j - 1]))
            j = int(cut[j])
    return tuple(reversed(ends))


def read_text(path: str | Path) -> str:
    """Read a text file as UTF-8; a byte-order mark is dropped and line ends become single newlines.

    Raises:
        DataError: the file is missing, a folder, empty, or not UTF-8.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise DataError(f"the text file {path} cannot be read ({e.strerror or e}); give a UTF-8 text file") from e
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path} is not UTF-8 text (byte {raw[e.start]:#04x} at offset {e.start}); convert it, "
            "for example with iconv -f LATIN1 -t UTF-8"
        ) from e
    if not text.strip():
        raise DataError(f"the text file {path} is empty; give a file with text to score")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_blocks(tokenizer: Any, text: str, protocol: str = "A", *, context: int, bos: int | None = None) -> TextBlocks:
    """Cut a text into blocks as the module's docstring says.

    Args:
        tokenizer: `qjax.models.tokenizer`'s, one of the ``tokenizers`` or ``transformers`` libraries, or a function
            from text to ids without special tokens.
        text: the text.
        protocol: "A" or "B".
        context: most tokens of a block, the beginning-of-text token included.
        bos: id of the beginning-of-text token; None takes the tokenizer's.

    Raises:
        DataError: unknown protocol, empty text, or a text too short for one block.
    """
    protocol = str(protocol).upper()
    if protocol not in PROTOCOLS:
        raise DataError(f"protocol {protocol!r} is not known; use 'A' (pieces between blank lines) or 'B' (one text)")
    if context < 2:
        raise DataError(f"a context of {context} tokens leaves nothing to score; give at least 2")
    if not text.strip():
        raise DataError("the text is empty; give a text to score")
    encode, own = encoder(tokenizer)
    front = [own if bos is None else bos] if (own if bos is None else bos) is not None else []
    if protocol == "A":
        pieces = (piece.strip() for piece in _BLANK_LINE.split(text))
        ids = ([*front, *encode(piece)][:context] for piece in pieces if piece)
    else:
        whole, room = encode(text), context - len(front)
        if len(whole) < room:
            raise DataError(
                f"the text has {len(whole)} tokens and protocol B needs {room} for one block; "
                "give a longer text, a shorter context, or use protocol A"
            )
        ids = ([*front, *whole[i : i + room]] for i in range(0, len(whole) - room + 1, room))
    blocks = tuple(np.asarray(b, np.int32) for b in ids if len(b) > 1)
    if not blocks:
        raise DataError("no piece of the text has two tokens, so there is nothing to score; give a longer text")
    return TextBlocks(blocks, protocol, context)


def given_blocks(ids: Any) -> TextBlocks:
    """Blocks that are given as ids: an integer array [N, T] or a sequence of id sequences.

    Raises:
        DataError: no block, a block of fewer than two tokens, or ids that are no integers.
    """
    arrays = [np.asarray(row) for row in ids]
    for i, row in enumerate(arrays):
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer) or row.size < 2:
            raise DataError(
                f"token block {i} has shape {row.shape} and dtype {row.dtype}; "
                "each block is a flat sequence of at least two integer ids"
            )
    if not arrays:
        raise DataError("there is no token block to score; give at least one")
    return TextBlocks(tuple(row.astype(np.int32) for row in arrays), "ids", max(map(len, arrays)))


def encoder(tokenizer: Any) -> tuple[Callable[[str], Any], int | None]:
    """Return a function from text to ids without special tokens, and the beginning-of-text id or None."""
    if hasattr(tokenizer, "bos_id"):
        return lambda text: tokenizer.encode(text, special=False), tokenizer.bos_id
    if hasattr(tokenizer, "bos_token_id"):
        return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id
    if hasattr(tokenizer, "encode"):
        known = (tokenizer.token_to_id(t) for t in ("<s>", "<|begin_of_text|>", "<bos>"))
        first = next((i for i in known if i is not None), None)
        return (lambda text: tokenizer.encode(text, add_special_tokens=False).ids), first
    if callable(tokenizer):
        return tokenizer, None
    raise DataError(
        f"{type(tokenizer).__name__} is no tokenizer; give qjax.models.tokenizer(folder), "
        "a tokenizers.Tokenizer or a function from text to ids"
    )
