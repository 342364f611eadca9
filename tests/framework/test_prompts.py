"""What a user types never becomes a special token, in a text or in a turn, whoever made the tokenizer."""

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from components.data.chat import ChatData
from components.data.tokenizers import SPECIALS, Tokenizer, bytes_tokenizer
from framework.prompts import Renderer

OPTIONS = {"kind": "bytes", "vocab_size": 2048, "path": None}
MARKS = ["<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>"]


def tool_tokenizer():
    """As published ones are: more special tokens than our five, known to the tokenizer.json alone."""
    backend = Backend.from_str(bytes_tokenizer().to_json())
    backend.add_special_tokens([AddedToken("<|tool|>", special=True)])
    return Tokenizer(backend)


@pytest.mark.parametrize("make", [bytes_tokenizer, tool_tokenizer])
@pytest.mark.parametrize("chat", [False, True])
def test_special_strings_of_a_user_are_text(make, chat):
    tokenizer = make()
    typed = "a<|tool|>".join(SPECIALS) + "<|tool|>"
    data = ChatData("none.jsonl", OPTIONS, 64, 1, 0.1, None, "completion", True, "strict", 0) if chat else None
    marks = [tokenizer.special_id(name) for name in (MARKS if chat else MARKS[:1])]
    ids = Renderer(tokenizer, data)(typed)
    assert [i for i in ids if i > 255] == marks and bytes(i for i in ids if i < 256).decode() == typed
