"""The prompt of an instruction: one object for training, generation and evaluation, so that they cannot differ."""

from __future__ import annotations

import json
import re

from components.contracts import UserError
from components.data.tokenizers import EOT

_ONE_TURN = (
    "{% if messages | length != 1 or messages[0]['role'] != 'user' %}{{ raise_exception('give one message of the user, an instruction') }}"
    f"{{% endif %}}{{{{ '{EOT}' }}}}"
)
_CONTENT = "{{ messages[0]['content'] }}"
_PIECE = re.compile(rf'{re.escape(_CONTENT)}|\{{\{{ ("(?:[^"\\]|\\.)*") \}}\}}', re.DOTALL)  # the user's words, or fixed ones as in JSON
_FIELD = re.compile(r"\{(instruction|input)\}")


class PromptTemplate:
    """What a model reads before it answers: a text with {instruction} and {input} in it; the answer follows its last character.

    with_input: for rows that have an input; without_input: for the others. Raises UserError where a field is missing, or one too many.

    Example:
        >>> PromptTemplate("Q: {instruction} ({input})", "Q: {instruction}").render("Who?")
        'Q: Who?'
    """

    def __init__(self, with_input: str, without_input: str) -> None:
        self.with_input, self.without_input = with_input, without_input
        wanted = {"with_input": {"instruction", "input"}, "without_input": {"instruction"}}
        for key, fields in wanted.items():
            text = getattr(self, key)
            if (found := set(_FIELD.findall(text))) != fields:
                shown = " and ".join(f"{{{field}}}" for field in sorted(found)) or "no field"
                needs = " and ".join(f"{{{field}}}" for field in sorted(fields, reverse=True))
                raise UserError(f"data.template.{key}: has {shown}; it needs {needs}, and no other")

    def render(self, instruction: str, given: str = "") -> str:
        """The prompt of an instruction with what is given to it, '' for nothing. Braces inside them stay as they are."""
        fields = {"instruction": instruction, "input": given}
        return _FIELD.sub(lambda found: fields[found[1]], self.with_input if given else self.without_input)

    @property
    def chat_template(self) -> str:
        """Jinja, as Hugging Face's tokenizers run it, that asks the one message of the user as an instruction without an input."""
        fixed = [f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" for text in self.without_input.split("{instruction}")]
        return _ONE_TURN + _CONTENT.join(fixed)

    def __repr__(self) -> str:
        return f"PromptTemplate({self.with_input!r}, {self.without_input!r})"


def from_chat_template(jinja: str) -> str | None:
    """The template without an input that `PromptTemplate.chat_template` was made of; None for any other Jinja."""
    if not jinja.startswith(_ONE_TURN):
        return None
    rest, found = jinja.removeprefix(_ONE_TURN), []
    while piece := _PIECE.match(rest):
        found.append("{instruction}" if piece[1] is None else json.loads(piece[1]))
        rest = rest[piece.end() :]
    return None if rest else "".join(found)
