"""The files beside the weights of a Hugging Face folder."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from components.data.templates import PromptTemplate
from components.data.tokenizers import EOT, Tokenizer, bytes_tokenizer
from components.interop.companions import data_option, named_end, prompt_template, write_companions

# Of a published chat model, whose conversations are written as ours but for the tools
PUBLISHED = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}{{ '<|' + message['role'] + '|>' + "
    "message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + "
    "message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

OURS = PromptTemplate("{instruction}{input}", "Do {instruction}: ").chat_template


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    return tmp_path


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_text_begins_as_our_documents_do(folder):
    """For whoever reads tokenizer.json; our own reader frames texts itself. A post-processor that is there is kept."""
    write_companions(folder, bytes_tokenizer(), 320, None)
    theirs = Backend.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode("ab").ids == [256, 97, 98] and theirs.encode("a", "b").ids == [256, 97, 256, 98]
    assert Tokenizer.load(folder).encode("ab") == [97, 98] and not (folder / "chat_template.jinja").exists()
    backend = Backend.from_str(bytes_tokenizer().to_json())
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    write_companions(folder, Tokenizer(backend), 320, None)
    assert read(folder, "tokenizer.json")["post_processor"]["type"] == "ByteLevel"


def test_numbers_are_those_of_the_tokenizer_and_of_config_json(folder):
    write_companions(folder, Tokenizer(Backend.from_str(bytes_tokenizer().to_json()), stops=[258, 7, 999]), 264, "x")
    assert read(folder, "generation_config.json") == {
        "bos_token_id": 256, "eos_token_id": [256, 260, 258, 7], "pad_token_id": 256, "suppress_tokens": [257, 259, 261, 262, 263],
    }  # fmt: skip
    assert read(folder, "tokenizer_config.json")["model_max_length"] == 512 and (folder / "chat_template.jinja").read_text() == "x"
    assert Tokenizer.load(folder).stop_ids == (256, 260, 258, 7) and named_end(folder / "tokenizer.json") == EOT


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "special": True}])
def test_the_end_of_text_that_a_folder_names(folder, token):
    file = folder / "tokenizer.json"
    assert named_end(file) is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert named_end(file) == "</s>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    assert named_end(file) is None


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_conversations_are_known_by_their_template(folder, place):
    file = folder / "tokenizer.json"
    assert data_option(file) is None
    for template, option in ((PUBLISHED, "chat"), (OURS, "multitask"), (OURS + "!", None), ("{{ messages[0]['content'] }}", None)):
        (folder / place).write_text(json.dumps({"chat_template": template}) if place.endswith("json") else template)
        assert data_option(file) == option and prompt_template(file) == ("Do {instruction}: " if template == OURS else None)
