"""The checks and what they protect from, and what one sample fails of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain_dist.data.chat.rendering.chat_template import WITH_TOOLS
from posttrain_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class Check:
    """What a check protects from, and how to fix what fails it."""

    level: str  # "error" or "warning"
    explain: str
    fix: str
    allowed: float = 0.0  # share of the rows that may fail without an alarm
    refused_if_all: bool = False  # a warning, but no row that passes is no accident
    of_answers: bool = False  # made where a row has answers to one prompt, only there


CHECKS: dict[str, Check] = {
    "prompt_prefix": Check(
        "error",
        "Training must show the text that inference shows: the tokens of each inference prompt "
        "begin the training tokens, and a turn reads as it did when it was written.",
        "set template.form=turns (one sample for each assistant turn) where the template "
        "rewrites earlier turns; else move spaces or line breaks from the end of the prompt "
        "to the beginning of the answer, or correct the template",
    ),
    "open_thinking": Check(
        "error",
        "The inference prompt opens a block of thoughts, and the turn has none: a model that is "
        "trained to answer inside of it would be served with its answers taken for thoughts.",
        "set template.thinking=close (the block is closed empty, and the model learns to close "
        "it), or give the answers thoughts (reasoning_content)",
    ),
    "closed_thinking": Check(
        "error",
        "The inference prompt closes the block of thoughts before the turn, and the turn has "
        "some: it would be trained to think where thinking is switched off.",
        "set template.variables so that the template lets the model think; or "
        "template.thinking=none, which leaves thoughts out",
    ),
    "generation_prompt": Check(
        "error",
        "What stands between the generation prompt and the supervised text is given by nobody "
        "at inference, and the model is never trained to write it.",
        "let the template write all of the header under add_generation_prompt, or move "
        "{% generation %} to the end of that prompt",
    ),
    "generation_marks": Check(
        "error",
        "Of each turn in the loss, what stands between {% generation %} marks is trained on, and "
        "nothing that is given at inference: no header and no earlier message.",
        "begin {% generation %} where the generation prompt ends (not in a macro), in each branch "
        "that writes a turn of the assistant; or set the weight of the turn to 0",
    ),
    "content_shown": Check(
        "error",
        "What the assistant says, thinks and calls stands in the text; a template may leave out "
        "what it does not know, and the model would be trained on the rest.",
        "choose a template that writes it; or write thoughts into the content as "
        "<think>...</think> (template.thinking=none leaves them out), and what stands beside a "
        "tool call into a turn of its own; or take it out of the row",
    ),
    "tools_shown": Check(
        "error",
        "A model that is to call tools reads their description in the prompt, and each call stands "
        "in its own turn; a template may write neither.",
        WITH_TOOLS,
    ),
    "tools_listed": Check(
        "warning",
        "The row lists tools that nobody calls, and the chat template does not write them.",
        f"nothing is to be done where the answers do without tools; else {WITH_TOOLS}",
    ),
    "double_bos": Check(
        "error",
        "A second begin-of-text token is text that the model has never seen before.",
        "remove the one with which the row begins, or one of those that the chat template writes",
    ),
    "end_of_turn": Check(
        "error",
        "A model that is not taught the end-of-turn token never stops.",
        "end each turn with a special token inside {% generation %} ... {% endgeneration %}; "
        "where rows are cut, set data.long_rows=drop or split, or raise data.max_length",
        allowed=0.01,
    ),
    "no_target": Check(
        "error",
        "A row without a supervised token teaches nothing.",
        "give the assistant something to say, or its turns a weight; if every row says this, the "
        "chat template's {% generation %} marks are misplaced",
    ),
    "empty_thinking": Check(
        "warning",
        "The template begins an answer without thoughts with an empty block of them. The block is "
        "not supervised: the prompt gives it where thinking is switched off.",
        "have the prompt give it, in training and in the export: template.variables="
        "{enable_thinking: false}, or whatever name the template reads; or set "
        "template.thinking=close, so that the model learns to write the block itself",
    ),
    "assistant_first": Check(
        "warning",
        "The row begins with the assistant. No inference prompt leads to that turn, so it is not "
        "supervised.",
        'nothing is to be done where it is a greeting; "weight": 1 on the turn has it trained, if '
        "the template writes an inference prompt for it",
    ),
    "unread_variables": Check(
        "warning",
        "The row's chat_template_kwargs name what its template does not read: it changes nothing.",
        "correct the name: `posttrain inspect --template` lists those that the template reads",
    ),
    "empty_turn": Check(
        "warning",
        "A turn of the assistant without a word and without a tool call teaches to end at once.",
        'leave such rows out, or give the turn "train": false; where every row says nothing, look '
        "at data.columns; a few are right where silence is the answer",
        refused_if_all=True,
    ),
    "null_arguments": Check(
        "warning",
        "A call has an argument that is null by itself, and the model learns to write it: that of "
        "a parameter of its tool, or of a tool that the row does not describe.",
        "nothing is to be done where null is meant; else leave the argument out, and where Arrow "
        "added it, write arguments as JSON text, or the row's tools with their parameters",
    ),
    "truncated_target": Check(
        "warning",
        "The row was cut before its first supervised token, so it is left out.",
        "raise data.max_length, or set data.long_rows=split (several samples of it, but of rows with "
        "answers to compare) or drop",
    ),
    "common_prompt": Check(
        "error",
        "The answers of a row follow one prompt, which is computed once: the tokens before the "
        "first target must be the same in all of them.",
        "write the answers alike: all with thoughts or all without (template.thinking=none leaves "
        "them out, close begins each with an empty block), no white space at their beginning; "
        "else remove the row",
        of_answers=True,
    ),
    "equal_answers": Check(
        "warning",
        "Behind the cut at data.max_length both answers are the same: nothing is left to compare, "
        "so the pair is left out.",
        "raise data.max_length, or set data.long_rows=drop",
        of_answers=True,
    ),
    "long_ranking": Check(
        "warning",
        "Prompt and answers of a ranking are longer than data.max_length, so it is compared in "
        "pairs of neighbours in rank, each with the prompt for itself.",
        "nothing is to be done where pairs will do; else raise data.max_length",
        of_answers=True,
    ),
    "no_other_answer": Check(
        "warning",
        "No row of the same file has another prompt, so no answer to another prompt stands beside "
        "this one: it adds nothing to the estimate of the KL divergence.",
        "put rows of several prompts into each file",
        of_answers=True,
    ),
    "control_tokens": Check(
        "warning",
        "The content quotes control tokens of the template; they are encoded as plain text, so "
        "that no content can forge a turn. In a row of plain text they are what they say: it "
        "begins or ends in the middle.",
        "nothing is to be done where the text means to quote them; else clean the data",
    ),
}


class CheckFailed(DataError):
    """A row that fails a check of level "error"; `check` is its name."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", check: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.check = check


@dataclass(slots=True)
class Faults:
    """The checks that one text fails, in the order in which they were made."""

    where: str
    strict: bool
    names: list[str] = field(default_factory=list)

    def note(self, name: str, what: str, fix: str = "") -> None:
        """Add a failed check, or refuse the row for it; an empty `what` is no fault.

        Args:
            name: of the check.
            fix: for this row; empty: that of the check.

        Raises:
            CheckFailed: the check is of level "error", and `strict` is set.
        """
        if not what:
            return
        check = CHECKS[name]
        if self.strict and check.level == "error":
            raise CheckFailed(what, where=self.where, fix=fix or check.fix, check=name)
        if name not in self.names:
            self.names.append(name)
