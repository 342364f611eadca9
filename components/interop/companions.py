"""What stands beside the weights in a Hugging Face folder: the tokenizer, when generation stops, how a conversation is written.

With it `AutoTokenizer.from_pretrained(folder)` gives the ids that a run was trained on, and `generate` stops where our engine does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import processors

from components.data.chat import CHAT_TURN
from components.data.templates import from_chat_template
from components.data.tokenizers import EOT, FILE_NAME, Tokenizer
from components.interop.files import CONFIG, read_json

TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"


def write_companions(folder: Path, tokenizer: Tokenizer, rows: int, chat_template: str | None) -> None:
    """Write them beside the config.json in `folder`.

    rows: of the head; those above the tokenizer's are never to be sampled (`suppress_tokens`: transformers obeys it, vLLM does not).
    chat_template: Jinja that renders messages as the run's data does; None for a run of plain text.

    Note: a text begins with <|endoftext|>, as every document of a run; a tokenizer.json that came with a post-processor keeps it.
    """
    (folder / FILE_NAME).write_text(with_document_start(tokenizer), encoding="utf-8")
    about = read_json(folder / CONFIG)
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT, "pad_token": EOT,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if "max_position_embeddings" in about:
        names["model_max_length"] = about["max_position_embeddings"]
    write_json(folder / TOKENIZER_CONFIG, names)
    unsaid = [*tokenizer.unsaid_ids, *range(tokenizer.vocab_size, rows)]
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.eot_id}
    write_json(folder / GENERATION_CONFIG, ids | {"suppress_tokens": unsaid})
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")


def with_document_start(tokenizer: Tokenizer) -> str:
    """Content of a tokenizer.json that puts <|endoftext|> before each text, where it puts nothing anywhere yet."""
    backend = Backend.from_str(tokenizer.to_json())
    if backend.post_processor is None:
        special = [(EOT, tokenizer.eot_id)]
        backend.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", pair=f"{EOT} $A {EOT} $B", special_tokens=special)
    return backend.to_str(pretty=True)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def named_end(file: Path) -> str | None:
    """The eos_token of the tokenizer_config.json beside a tokenizer.json, None where there is none."""
    told = beside(file).get("eos_token")
    told = told.get("content") if isinstance(told, dict) else told
    return told if isinstance(told, str) else None


def data_option(file: Path) -> str | None:
    """The option of the group `data` that writes turns as the chat template beside a tokenizer.json does; None for none that is known."""
    template = _chat_template(file)
    return "chat" if template is not None and CHAT_TURN in template else "multitask" if prompt_template(file) is not None else None


def prompt_template(file: Path) -> str | None:
    """The prompt of an instruction, a text with {instruction} in it, where the chat template beside a tokenizer.json is one of ours."""
    template = _chat_template(file)
    return None if template is None else from_chat_template(template)


def _chat_template(file: Path) -> str | None:
    template = beside(file).get("chat_template")
    if (file.parent / CHAT_TEMPLATE).is_file():
        template = (file.parent / CHAT_TEMPLATE).read_text(encoding="utf-8", errors="replace")
    return template if isinstance(template, str) else None


def beside(file: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer.json, {} where there is none."""
    about = file.parent / TOKENIZER_CONFIG
    return read_json(about) if about.is_file() else {}
