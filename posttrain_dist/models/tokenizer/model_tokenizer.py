"""What our code uses of a tokenizer of transformers, as a value that is sent to other processes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer under the names that those of transformers use; nobody may change it.

    It is sent, and kept on disk, as text: `backend_tokenizer` is made of that when it is first
    asked for.
    """

    backend_text: str  # as tokenizer.json; empty: not a fast one
    special_tokens_map: dict[str, str]  # "eos_token" and its like -> token
    all_special_tokens: list[str]  # those, and others that the tokenizer calls special
    special_ids: dict[str, int | None]  # of all_special_tokens
    chat_template: str | dict[str, str] | None
    encode_special_tokens: bool = False  # as plain text; the text of a backend leaves it out

    @classmethod
    def of(cls, tokenizer: Any) -> ModelTokenizer:
        """The value of a tokenizer of transformers."""
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        special = list(tokenizer.all_special_tokens)
        return cls(
            backend_text="" if backend is None else backend.to_str(),
            special_tokens_map=dict(tokenizer.special_tokens_map),
            all_special_tokens=special,
            special_ids={name: tokenizer.convert_tokens_to_ids(name) for name in special},
            chat_template=tokenizer.chat_template,
            encode_special_tokens=backend is not None and backend.encode_special_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields, for `ModelTokenizer(**fields)`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __getstate__(self) -> dict[str, Any]:
        return self.to_json()  # without what is made of the text

    @cached_property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer itself."""
        from tokenizers import Tokenizer

        made = Tokenizer.from_str(self.backend_text)
        made.encode_special_tokens = self.encode_special_tokens
        return made

    @cached_property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id -> token, of those that are not of the vocabulary, with their flags."""
        return self.backend_tokenizer.get_added_tokens_decoder() if self.is_fast else {}

    @property
    def is_fast(self) -> bool:
        """Whether it gives the characters of each token."""
        return bool(self.backend_text)

    @property
    def all_special_ids(self) -> list[int | None]:
        """Ids of `all_special_tokens`."""
        return [self.special_ids[name] for name in self.all_special_tokens]

    @property
    def bos_token(self) -> str | None:
        """What begins a text."""
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """What ends a text."""
        return self.special_tokens_map.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of the token that fills up."""
        return self._special_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """The id of the token that stands for all that has none."""
        return self._special_id("unk_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.special_ids[token]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token; that of the unknown token where there is none."""
        found = self.backend_tokenizer.token_to_id(token)
        return self.unk_token_id if found is None else found

    def decode(self, ids: list[int]) -> str:
        """Text of some tokens, as it is."""
        return self.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def get_chat_template(self) -> str:
        """The tokenizer's own template; the one called "default" where it has several.

        Raises:
            ValueError: there is none.
        """
        template = self.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            raise ValueError("the tokenizer has no chat template, or several without a default")
        return template
