"""What a search for RoPE factors minimises: perplexity of the answer to a needle question, or of every token (arXiv 2502.20082, sec. 3.2).

Token perplexity hardly sees whether far tokens are reached at all, since most tokens are predicted from near ones; the answer to a question
about the beginning of a long text depends on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.contracts import Batch, Model, Tokenizer, UserError

Objective = Callable[[Model], float]
_ADJECTIVES = ("amber", "brisk", "calm", "dusty", "eager", "faint", "grand", "hollow", "idle", "jolly", "keen", "lucid", "mellow", "noble")
_NOUNS = ("anchor", "basket", "candle", "drawer", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle", "ladder", "mirror")
_DIGITS = 7  # of the hidden number


@dataclass(frozen=True)
class Needle:
    """A document whose last tokens answer its question. ids: prompt and answer, as token ids. depth: None where it is not known."""

    ids: tuple[int, ...]
    answer_tokens: int
    depth: float | None  # where the needle lies: 0 at the beginning, 1 right before the question


def needles(text: Sequence[int], tokenizer: Tokenizer, length: int, count: int, depths: Sequence[float], seed: int) -> list[Needle]:
    """`count` documents of exactly `length` tokens: an instruction, text with a needle at a depth, a question and its answer.

    Args:
        text: token ids of running text, cut into pieces that do not overlap; at least count * length of them.
        depths: taken in turn. The paper has the needle at the very beginning alone.

    Prompt and answer are tokenised apart, so that no token spans both and the answer's tokens are counted exactly.

    Raises:
        UserError: too little text, or a length that leaves no room for any.
    """
    rng = np.random.Generator(np.random.PCG64([seed, length]))
    made: list[Needle] = []
    used = 0
    for i in range(count):
        key = f"{_ADJECTIVES[rng.integers(len(_ADJECTIVES))]}-{_NOUNS[rng.integers(len(_NOUNS))]}"
        value = str(rng.integers(10 ** (_DIGITS - 1), 10**_DIGITS))
        start = [tokenizer.eot_id, *tokenizer.encode("A special magic number is hidden in the following text. Remember it.\n")]
        fact = tokenizer.encode(f"One of the special magic numbers for {key} is: {value}.\n")
        question = tokenizer.encode(f"\nWhat is the special magic number for {key}? The special magic number for {key} is:")
        answer = tokenizer.encode(f" {value}")
        room = length - len(start) - len(fact) - len(question) - len(answer)
        if room < 1:
            raise UserError(f"task.length: {length}; a needle, its question and its answer alone take {length - room} tokens")
        if used + room > len(text):
            raise UserError(f"data: {len(text):,} tokens of text; {count} documents of {length} tokens need up to {count * length:,}")
        filler, depth = list(text[used : used + room]), depths[i % len(depths)]
        used += room
        cut = round(depth * room)
        made.append(Needle((*start, *filler[:cut], *fact, *filler[cut:], *question, *answer), len(answer), depth))
    return made


def answer_losses(model: Model, documents: Sequence[Needle], rows: int = 1) -> list[Tensor]:
    """Negative log-likelihood of each answer token, in nats: one (answer tokens,) float32 CPU tensor a document.

    Only the last positions are projected to the vocabulary. rows: documents a forward.
    """
    device = model.head_weight.device
    found: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, len(documents), rows):
            some = documents[first : first + rows]
            ids = torch.tensor([document.ids for document in some], device=device)  # (B, T)
            longest = max(document.answer_tokens for document in some)
            hidden = model(Batch(ids[:, :-1])).hidden[:, -longest:]
            logits = model.logits(hidden).float()  # (B, A, V)
            losses = logits.logsumexp(-1) - logits.gather(2, ids[:, -longest:, None]).squeeze(2)  # (B, A)
            found += [losses[i, longest - document.answer_tokens :].cpu() for i, document in enumerate(some)]
    return found


def needle_perplexity(documents: Sequence[Needle], rows: int = 1) -> Objective:
    """exp of the mean loss over all answer tokens of all documents: no other token counts.

    >>> class Even:  # knows nothing: every token is as likely as any other
    ...     head_weight = torch.zeros(64, 1)
    ...     def __call__(self, batch, state=None): return type("Output", (), {"hidden": torch.zeros(*batch.input_ids.shape, 1)})
    ...     def logits(self, hidden): return torch.zeros(*hidden.shape[:2], 64)
    >>> round(needle_perplexity([Needle((1, 2, 3, 4), 2, 0.0)])(Even()), 4)
    64.0
    """
    return lambda model: math.exp(torch.cat(answer_losses(model, documents, rows)).double().mean().item())


def token_perplexity(documents: Sequence[Needle], rows: int = 1, at_once: int = 512) -> Objective:
    """exp of the mean loss over every token of the documents but the first; `at_once`: positions projected to the vocabulary at a time."""

    def objective(model: Model) -> float:
        device, total, tokens = model.head_weight.device, 0.0, 0
        with torch.no_grad():
            for first in range(0, len(documents), rows):
                ids = torch.tensor([document.ids for document in documents[first : first + rows]], device=device)
                hidden = model(Batch(ids[:, :-1])).hidden.flatten(0, 1)
                for part, wanted in zip(hidden.split(at_once), ids[:, 1:].flatten().split(at_once), strict=True):
                    logits = model.logits(part).float()
                    total += (logits.logsumexp(-1) - logits.gather(1, wanted[:, None]).squeeze(1)).sum().item()
                    tokens += len(wanted)
        return math.exp(total / tokens)

    return objective


def guess_perplexity(documents: Sequence[Needle]) -> float:
    """`needle_perplexity` of a model that knows how an answer is written, and nothing of which number it is: what finding has to beat.

    >>> round(guess_perplexity([Needle((), 7, 0.0)]), 3)
    9.851
    """
    values = 9 * 10 ** (_DIGITS - 1)
    return values ** (len(documents) / sum(document.answer_tokens for document in documents))


OBJECTIVES: dict[str, Callable[[Sequence[Needle], int], Objective]] = {
    "needle_ppl": needle_perplexity,
    "token_ppl": token_perplexity,
}
