"""Generation in this process by plain transformers: batches, a stream, scores, weight updates.

Letters of shapes: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.data.chat.rendering.served import Prompt
from posttrain_dist.errors import ModelError
from posttrain_dist.generation.adapter_places import (
    BASE,
    base_of,
    find_named,
    own_adapters,
    stood_on_nf4,
)
from posttrain_dist.generation.adapters import AdapterSet, Attach
from posttrain_dist.generation.base import Completion, Reply, Sampling, StopReason
from posttrain_dist.generation.local_folder import (
    ChatFormat,
    chat_format,
    choose_tokenizer,
    has_tokenizer,
    load_model,
    load_tokenizer,
)
from posttrain_dist.generation.processors import LogProbRecorder, StopWhenSet
from posttrain_dist.generation.weight_digest import weight_digest
from posttrain_dist.models.architectures.positions import learned_positions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens, padding included, of one forward of `score`: its logits of all positions are alive.
SCORED_TOKENS = 4096


class LocalGenerator:
    """TokenGenerator and TextGenerator over one transformers model; not for several threads.

    Args:
        model: a causal LM in evaluation mode. Its generation config is replaced: a folder's own
            may sample or penalise repetition, and answers are compared over models.
        tokenizer: renders conversations by its chat template.
        batch_size: prompts that are completed together.
        end_token_ids: more tokens that end an answer, beside those of model and tokenizer.
        attach: loads adapters that `peft` does not know; see `adapters.Attach`.

    Attributes:
        adapter: the name of the one that answers where `Sampling.adapter` is None; "none": the
            base model.

    Raises:
        ModelError: nothing names a token that ends an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        end_token_ids: Sequence[int] = (),
        attach: Attach | None = None,
    ) -> None:
        from transformers import GenerationConfig

        self.model, self.batch_size = model, batch_size
        self._end_token_ids = end_token_ids
        self.tokenizer, self.end_ids, self._reader = chat_format(model, tokenizer, end_token_ids)
        self.adapter = BASE
        self._adapters = AdapterSet(model, attach)
        self._formats: dict[str, ChatFormat] = {}  # of adapters that have their own
        pad = tokenizer.pad_token_id
        self._pad_id: int = self.end_ids[0] if pad is None else pad
        self._version = 0
        self._refused_update = False
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=self.end_ids, pad_token_id=self._pad_id
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        batch_size: int = 32,
        needs_template: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
        end_token_ids: Sequence[int] = (),
        adapters: Mapping[str, Path] | None = None,
        attach: Attach | None = None,
    ) -> LocalGenerator:
        """The generator of a Hugging Face folder, or of an adapter folder and its base.

        The model runs on the GPU in its own dtype if there is one, else on the CPU in float32. Of
        an adapter folder, the adapter answers, under the name `adapter`; of an ensemble of
        prompts the first one, `adapter-0`. The base is in NF4 if all adapters were trained so.

        Args:
            needs_template: refuse a folder without chat template; False where no conversation
                will be answered.
            tokenizer: with its chat template, in place of the folder's own.
            end_token_ids: more tokens that end an answer.
            adapters: more of them on the same base, name -> folder.

        Raises:
            ModelError: a folder holds no model that transformers can load, no adapter of it, or
                no template.
            ConfigError: two adapters have one name.
        """
        own = {} if (folder / "config.json").is_file() else own_adapters(folder)
        base = base_of(next(iter(own.values()))) if own else folder
        given = {k: v for found in find_named(adapters or {}).values() for k, v in found.items()}
        folders = [*own.values(), *given.values()]
        if tokenizer is None:
            places = [*own.values(), base, *given.values()]
            tokenizer = choose_tokenizer(places, base, needs_template=needs_template)
        generator = cls(
            load_model(base, nf4=bool(folders) and all(map(stood_on_nf4, folders))),
            tokenizer,
            batch_size=batch_size,
            end_token_ids=end_token_ids,
            attach=attach,
        )
        for name, path in [*own.items(), *given.items()]:
            generator.add_adapter(name, path)
        generator.adapter = next(iter(own), BASE)
        return generator

    # ------------------------------------------------------------------------------ adapters

    @property
    def adapters(self) -> list[str]:
        """Names that `Sampling.adapter` can have, beside "none"."""
        return self._adapters.names

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter folder beside those that are there; its own tokenizer speaks for it.

        Raises:
            ConfigError: the name is taken.
            ModelError: the folder cannot be loaded onto this model.
        """
        self._adapters.add(name, folder)
        if has_tokenizer(folder):
            tokenizer = load_tokenizer(folder, Path(self.model.name_or_path))
            if tokenizer.chat_template or not self.tokenizer.chat_template:
                found = chat_format(self.model, tokenizer, self._end_token_ids)
                self._formats[name] = found

    def choose(self, name: str) -> None:
        """Have an adapter, or the base model as "none", answer where a request names none.

        Raises:
            ConfigError: there is no such adapter.
        """
        self._adapters.check(name)
        self.adapter = name

    def _chosen(self, sampling: Sampling) -> tuple[str, ChatFormat]:
        """The adapter that a request asks for, and its format."""
        name = self.adapter if sampling.adapter is None else sampling.adapter
        self._adapters.check(name)
        default = ChatFormat(self.tokenizer, self.end_ids, self._reader)
        return name, self._formats.get(name, default)

    # -------------------------------------------------------------------------------- tokens

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        found: dict[int, Completion] = {}
        chosen_format = self._chosen(sampling)[1]
        with self._seeded(sampling.seed):
            for chosen in self._batches(prompts, sampling):
                recorder = LogProbRecorder()
                new_BT = self._complete(
                    [prompts[index] for index in chosen], sampling, logits_processor=[recorder]
                )
                log_probs_BT = recorder.log_probs(new_BT[:, -1])
                rows = zip(chosen, new_BT.tolist(), log_probs_BT.tolist(), strict=True)
                for index, row, log_probs in rows:
                    ids, reason = chosen_format.until_end(row)
                    found[index] = Completion(ids, log_probs[: len(ids)], reason, self._version)
        return [found[index] for index in range(len(prompts))]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        import torch

        self._check_weights()
        scores: list[list[float]] = [[] for _ in sequences]
        for chosen in _groups_of_tokens(sequences, SCORED_TOKENS):
            inputs = self._padded([sequences[index] for index in chosen], left=False)
            with torch.inference_mode(), self._adapters.active(self.adapter) as model:
                logits_BTV = model(**inputs, use_cache=False).logits
                # A prompt's virtual tokens have logits too.
                logits_BTV = logits_BTV[:, -inputs["input_ids"].shape[1] :]
                for row, index in enumerate(chosen):
                    ids_T = torch.tensor(list(sequences[index]), device=logits_BTV.device)
                    logits_TV = logits_BTV[row, : len(ids_T) - 1].float()
                    label_T = logits_TV.gather(-1, ids_T[1:, None])[:, 0]
                    scores[index] = (label_T - logits_TV.logsumexp(-1)).tolist()
        return scores

    def update(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        import torch

        if self.adapters:
            raise self._refusal("there are adapters on the model")
        stored = self.model.state_dict()  # tied tensors under each of their names
        self._refused_update, written = True, set()
        with torch.no_grad():
            for name, tensor in tensors:
                if name not in stored:
                    raise self._refusal(f"the model has no weight {name}")
                target = stored[name]
                if target.shape != tensor.shape:
                    shapes = f"{tuple(tensor.shape)}, the model's is {tuple(target.shape)}"
                    raise self._refusal(f"{name} has the shape {shapes}")
                target.copy_(tensor)
                written.add(target.data_ptr())
        missing = [name for name, tensor in stored.items() if tensor.data_ptr() not in written]
        if missing:
            raise self._refusal(f"{len(missing)} weights are missing, first of them {missing[0]}")
        self._refused_update, self._version = False, version
        # Tied tensors once, under their first name, as an engine's `full_tensors` gives them.
        served = {tensor.data_ptr(): name for name, tensor in reversed(stored.items())}
        return weight_digest((name, stored[name]) for name in served.values())

    # ---------------------------------------------------------------------------------- text

    def reply(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        chosen_format = self._chosen(sampling)[1]
        encoded = [chosen_format.encode(prompt) for prompt in prompts]
        found: dict[int, Reply] = {}
        with self._seeded(sampling.seed):
            for chosen in self._batches(encoded, sampling):
                new_BT = self._complete([encoded[index] for index in chosen], sampling)
                for index, row in zip(chosen, new_BT.tolist(), strict=True):
                    ids, reason = chosen_format.until_end(row)
                    answer = chosen_format.read(ids)
                    found[index] = Reply(answer.words, reason, answer.thoughts)
        return [found[index] for index in range(len(prompts))]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[str, None, Reply]:
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        chosen_format = self._chosen(sampling)[1]
        encoded, reader = chosen_format.encode(prompt), chosen_format.reader
        # transformers' stubs do not know that every tokenizer can be streamed.
        tokenizer: Any = chosen_format.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        closed = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                with self._seeded(sampling.seed):
                    stop = StoppingCriteriaList([StopWhenSet(closed)])
                    self._complete([encoded], sampling, streamer=streamer, stopping_criteria=stop)
            except BaseException as error:  # raised again below, in the thread that reads
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            raw = shown = ""
            for piece in streamer:
                raw += piece
                now = reader.read(raw).shown
                if now.startswith(shown) and now != shown:
                    yield now[len(shown) :]
                    shown = now
        finally:
            closed.set()
            thread.join()
        if failures:
            raise failures[0]
        answer = reader.read(raw)
        if not answer.shown.startswith(shown):  # its beginning was read otherwise
            yield f"\n\n{answer.shown}"
        ends = tuple(str(tokenizer.decode([token])) for token in chosen_format.end_ids)
        reason = StopReason.end_token if raw.endswith(ends) else StopReason.length
        return Reply(answer.words, reason, answer.thoughts)

    # -------------------------------------------------------------------------------- inside

    def _batches(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        """Indices of the prompts of each batch, like lengths together: less padding.

        Behind a prompt adapter there is none: `peft` would count it as a distance.
        """
        padded = self._adapters.virtual_tokens(self._chosen(sampling)[0]) == 0
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        batch: list[int] = []
        for index in order:
            longer = bool(batch) and len(prompts[index]) > len(prompts[batch[0]])
            if len(batch) == self.batch_size or (longer and not padded):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _padded(self, rows: Sequence[Sequence[int]], *, left: bool) -> dict[str, torch.Tensor]:
        import torch

        shape = (len(rows), max(map(len, rows)))
        ids_BT, mask_BT = torch.full(shape, self._pad_id), torch.zeros(shape, dtype=torch.int64)
        for row, ids in enumerate(rows):
            assert len(ids) > 0, "an empty row has no first token to go on from"
            place = slice(shape[1] - len(ids), None) if left else slice(len(ids))
            ids_BT[row, place], mask_BT[row, place] = torch.tensor(list(ids)), 1
        device = self.model.device
        return {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}

    def _complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, **more: Any
    ) -> torch.Tensor:
        """New tokens [B, T], padded behind a row's end token. `more` goes to transformers."""
        import torch

        self._check_weights()
        inputs = self._padded(prompts, left=True)  # answers begin at the same column of every row
        if sampling.temperature > 0:
            more |= {"do_sample": True, "temperature": sampling.temperature}
            more |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        name, chosen = self._chosen(sampling)
        if name in self._formats:
            more["eos_token_id"] = chosen.end_ids
        before = inputs["input_ids"].shape[1] + self._adapters.virtual_tokens(name)
        most = self._room(sampling.max_new_tokens, after=before)
        with torch.inference_mode(), self._adapters.active(name) as model:
            output_BT: torch.Tensor = model.generate(**inputs, max_new_tokens=most, **more)
        return output_BT[:, inputs["input_ids"].shape[1] :]

    def _room(self, asked: int, *, after: int) -> int:
        """How many of `asked` new tokens a model of learned positions has left behind a prompt."""
        positions = learned_positions(self.model.config.to_dict())
        if positions is not None and after >= positions:
            raise ModelError(
                f"the model has learned {positions} positions, and a prompt has {after} tokens",
                where=self._where,
                fix="ask with a shorter conversation",
            )
        return asked if positions is None else min(asked, positions - after)

    @contextlib.contextmanager
    def _seeded(self, seed: int | None) -> Iterator[None]:
        """Torch's random state set by `seed`, and as it was afterwards."""
        import torch

        if seed is None:
            yield
            return
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _check_weights(self) -> None:
        if self._refused_update:
            raise ModelError(
                "the last update of the weights was refused halfway",
                where=self._where,
                fix="update with all weights of one version",
            )

    def _refusal(self, what: str) -> ModelError:
        fix = "update with the weights of this model, each under its Hugging Face name"
        return ModelError(f"an update is refused: {what}", where=self._where, fix=fix)

    @property
    def _where(self) -> str:
        return str(self.model.name_or_path)


def _groups_of_tokens(rows: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Indices of rows of like length whose padded sizes sum to at most `most`, or of one row."""
    group: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        if group and (len(group) + 1) * len(rows[index]) > most:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
