"""Tokenizers of Hugging Face folders, through the ``tokenizers`` library alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from qjax.errors import ModelError


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        raw: the ``tokenizers.Tokenizer``.
        bos_id, eos_id: ids of the tokens that begin and end a text, or None.
    """

    def __init__(self, raw: RawTokenizer, config: dict[str, Any] | None = None) -> None:
        config = config or {}
        self.raw = raw
        self.raw.no_truncation()
        self.raw.no_padding()
        self.bos_id = self._special(config.get("bos_token"))
        self.eos_id = self._special(config.get("eos_token"))
        # Sentencepiece-born tokenizers say this in tokenizer_config.json, and it wins over tokenizer.json.
        self._add_bos = config.get("add_bos_token")

    def _special(self, token: Any) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self.raw.token_to_id(content)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.raw.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; ``special=True`` adds what the tokenizer adds by default, such as ``<s>`` in front."""
        ids = self.raw.encode(text, add_special_tokens=special).ids
        if special and self.bos_id is not None and self._add_bos is not None:
            starts = bool(ids) and ids[0] == self.bos_id
            if self._add_bos and not starts:
                return [self.bos_id, *ids]
            if not self._add_bos and starts:
                return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; special tokens are left out unless asked for."""
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=not special)


def tokenizer(folder: str | Path) -> Tokenizer:
    """Read ``tokenizer.json`` (and ``tokenizer_config.json`` where there is one) of a folder.

    Raises:
        ModelError: the file is missing or damaged.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json; add it (transformers writes one with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder))."
        )
    try:
        raw = RawTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} cannot be read as a tokenizer ({error}); download it again.") from None
    side = folder / "tokenizer_config.json"
    try:
        config = json.loads(side.read_text("utf-8")) if side.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{side} is not valid JSON ({error}); download it again.") from None
    return Tokenizer(raw, config)
