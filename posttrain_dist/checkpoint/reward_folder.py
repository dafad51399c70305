"""What the folder of a reward model needs beside the weights: a pad token, and how it is asked.

transformers reads the reward at the last token that is not the pad token, so the pad token must be
none that ends a turn; many causal LMs pad with that one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain_dist.errors import CheckpointError
from posttrain_dist.files import read_object

# Parts of the names of tokens that no text has, the best first.
_UNUSED = ("pad", "reserved", "unused", "extra", "placeholder", "dummy")

_CARD = """\
---
library_name: "transformers"
tags: ["posttrain-dist", "reward"]
---
# Reward model made of {base}

It gives a conversation that ends with an answer one number, and the better answer the larger one.
The number is read at the token that ends the answer, `{end}`: what the chat template writes behind
it is cut off, as it was in training.

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "<this folder>"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()

def text_of(messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text[: text.rindex({end!r}) + len({end!r})]

texts = [text_of(messages) for messages in conversations]
batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
rewards = model(**batch).logits[:, 0]
```

It pads with `{pad}`, which ends no turn. vLLM serves the folder with `vllm serve <folder> --runner
pooling`; ask `/classify` with such a text and `"add_special_tokens": false`.
"""


def finish_reward_folder(
    folder: Path,
    base: str,
    end_token_ids: Sequence[int],
    target: Path,
    notice: Callable[[str], None],
) -> None:
    """Write pad token and README.md of a folder whose tokenizer and weights are there.

    An adapter's folder has no config.json, and a README.md of its own.

    Args:
        base: name of the model that the training began with.
        target: what the folder will be called, for errors.
        notice: called with a line where another pad token than the tokenizer's is taken.

    Raises:
        CheckpointError: the tokenizer has no token that could be padded with.
        OSError: the disk refused.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    ends = set(end_token_ids) or {tokenizer.eos_token_id}
    pad = next((each for each in _candidates(tokenizer) if each not in ends), None)
    if pad is None:
        raise CheckpointError(
            "its tokenizer has no token to pad batches with but those that end a turn, where the "
            "reward is read",
            where=str(target),
            fix="train with 'model.add_tokens=[\"<|pad|>\"]'",
        )
    token = tokenizer.convert_ids_to_tokens(pad)
    if pad != tokenizer.pad_token_id:
        notice(f"the reward model pads with {token}: the tokenizer's own pad token ends turns")
    for name, values in {
        "tokenizer_config.json": {"pad_token": token, "padding_side": "right"},
        "special_tokens_map.json": {"pad_token": token},
        "config.json": {"pad_token_id": pad},
    }.items():
        _change(folder / name, values)
    if (folder / "config.json").is_file():
        end = tokenizer.convert_ids_to_tokens(next(iter(end_token_ids or ends)))
        card = _CARD.format(base=base, end=end, pad=token)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _candidates(tokenizer: Any) -> Iterator[int]:
    """Tokens to pad with, the best first: some may be the end of a turn."""
    special = {
        i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    if tokenizer.pad_token_id is not None:
        yield tokenizer.pad_token_id
    for part in _UNUSED:
        yield from (i for i, name in special.items() if part in name.lower())
    others = (tokenizer.unk_token_id, tokenizer.bos_token_id, *special)
    yield from (i for i in others if i is not None)


def _change(file: Path, values: dict[str, Any]) -> None:
    if file.is_file():
        changed = {**read_object(file), **values}
        file.write_text(json.dumps(changed, indent=2, ensure_ascii=False), encoding="utf-8")
