"""`data=chat`: conversations from tables, each a document of its own in Phi-4-Mini's chat form, packed whole into rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from components.contracts import Tokenizer, UserError
from components.data.base import CorpusData
from components.data.documents import Corpus, Piece
from components.data.errors import choice, fraction
from components.data.sources import FileCorpus, PathSpec, Record, file_sets, parse_entries
from components.data.tokenizers import ASSISTANT, END, EOT, SYSTEM, USER

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
LOSS_ON = ("completion", "all")
CHAT_TURN = f"'<|' + message['role'] + '|>' + message['content'] + '{END}'"  # in Jinja, as Hugging Face's tokenizers run it
CHAT_TEMPLATE = (  # what `ChatData.render` does where the user's turn is the last
    f"{{{{ '{EOT}' }}}}{{% for message in messages %}}{{{{ {CHAT_TURN} }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)
Message = Mapping[str, str]


def turns(messages: Sequence[Message], loss_on: str, where: str) -> tuple[Piece, ...]:
    """Render messages {role, content} as `<|role|>content<|end|>`, nothing between them (Phi-4-Mini model card).

    With loss_on "completion" the labels are the assistants' contents and the `<|end|>` after each, and with "all" every token.
    Raises UserError, beginning with `where`, for what is no conversation.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where}: a conversation is a list of {{role, content}}, not {messages!r:.60}")
    pieces: list[Piece] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UserError(f"{where}: message {i} is {message!r:.60}; it needs a role and a content that is text")
        role = choice(f"{where}: role of message {i}", message["role"], ROLES)
        counts = loss_on == "all" or role == "assistant"
        pieces += [Piece(ROLES[role], special=True, loss=loss_on == "all"), Piece(message["content"], loss=counts)]
        pieces.append(Piece(END, special=True, loss=counts))
    return tuple(pieces)


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids that ask a model for the next assistant turn: see `ChatData.render`."""
    pieces = list(turns(messages, "all", "messages"))
    if messages[-1]["role"] == "assistant":
        pieces.pop()
    else:
        pieces.append(Piece(ASSISTANT, special=True))
    ids = [tokenizer.eot_id]
    for piece in pieces:
        ids += [tokenizer.special_id(piece.text)] if piece.special else tokenizer.encode(piece.text)
    return ids


def conversation(loss_on: str, file: str, place: str, record: Record) -> tuple[Piece, ...]:
    """Render a row with `messages`, or with `prompt` and `completion`. Raises UserError naming the row when it has neither."""
    where = f"{file}, {place}"
    if isinstance(record, str):
        raise UserError(f"{file}: plain text holds no conversations; give .jsonl or .parquet with messages, or prompt and completion")
    if record.get("messages") is not None:
        messages = record["messages"]
    elif "prompt" in record and "completion" in record:
        messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]
    else:
        raise UserError(f"{where} has only {', '.join(map(str, record))}; a conversation needs messages, or prompt and completion")
    pieces = turns(messages, loss_on, where)
    if not any(piece.loss for piece in pieces):
        raise UserError(f"{where}: no assistant message, so that nothing in it could be learnt; drop it or set data.loss_on=all")
    return pieces


class ChatData(CorpusData):
    """Conversations from `path` (.jsonl, .parquet or hub:NAME; same forms as for text), whole ones in a row; without `pack` one a row.

    Rows hold `messages` [{role: system | user | assistant, content}], or `prompt` and `completion`. loss_on: completion or all.
    A conversation longer than seq_len is cut in training (the summary counts them) and goes on in a further row when held out.
    """

    whole_documents = True
    chat_template = CHAT_TEMPLATE

    def __init__(
        self, path: PathSpec | None, tokenizer: Mapping[str, Any], seq_len: int, batch_size: int, val_fraction: float,
        val_path: PathSpec | None, loss_on: str, pack: bool, encoding_errors: str, num_workers: int,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, seq_len, batch_size, num_workers)
        self.packed = pack
        if path is None:
            raise UserError("data.path: missing; give a .jsonl or .parquet file, a folder, glob or hub:NAME (data.path=chats.jsonl)")
        errors: Any = choice("data.encoding_errors", encoding_errors, ("strict", "replace"))
        share = fraction("data.val_fraction", val_fraction)
        render = partial(conversation, choice("data.loss_on", loss_on, LOSS_ON))
        self._chats = [
            FileCorpus(files, val_files, render, share, tails=False, variant=f"chat {loss_on}")
            for files, val_files in file_sets(parse_entries("data.path", path), val_path, errors, None)
        ]
        self.source = "; ".join(corpus.name for corpus in self._chats)

    def _corpora(self) -> Sequence[Corpus]:
        return self._chats

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that ask the model for the next assistant turn; a last assistant message is taken as that turn's beginning.

        Raises UserError for what is no conversation.
        """
        return prompt_ids(self.tokenizer, messages)
