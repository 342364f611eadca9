"""Option task=rope_search: RoPE factors with which trained weights read longer rows, found by evolution. Trains nothing."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from components.contracts import Data, RopeRegime, RopeSpec, Tokenizer, UserError
from components.search.evolution import FAILURES, Result, search
from components.search.log import Log
from components.search.needle import OBJECTIVES, Needle, guess_perplexity, needle_perplexity, needles
from components.search.scoring import documents_digest, of_factors, turned_by, weights_digest
from components.search.space import Space
from components.search.variation import Evolution
from framework.build import read_config
from framework.parts import Parts
from framework.procedure import Context, Procedure, autocast, refuse_several_tasks, refuse_unheard, text_ids
from framework.rope_options import hydra, rope_spec, rope_words
from framework.runs import typed_before
from framework.search_report import FOUND, SearchProgress, say_table, write_plots, write_result, write_tables
from framework.signatures import nearest

LOG_FILE, COMPARE_FILE, RESULT_FILE = "rope_search.jsonl", "rope_compare.jsonl", "factors.json"
Questions = Callable[[int, int, int], list[tuple[list[int], int]]]  # (tokens, how many, seed) -> (ids, tokens of the answer at their end)


class RopeSearch(Procedure):
    """Scores vectors of factors by what the model makes of documents of the target length, and varies the best (arXiv 2502.20082).

    The documents are the data's own questions, of the target length, where it makes some (`data.questions`); else they hold a needle in its
    held-out text (then its training text). Every evaluation is a line of rope_search.jsonl; a resumed run takes what is there and ends with
    the same factors.json, to the byte. A score that is not finite counts as the worst.

    Args: see conf/task/rope_search.yaml; those of the evolution and of the space are explained at `Evolution` and `Space`.

    Files: factors.json, the factors as other programs load them and what they were found with; tables/NAME.json, the same of the rules in
    `compare`, and tables/found.json; factors.png; search.png.

    Metrics: search/best, score of the factors found; search/r, where their interpolation begins; search/critical_index, where theory has
    it; search/evaluations; search/failed; search/seconds of all evaluations; search/score@NAME, that of a rule in `compare` on the same
    documents, and search/score_same_attention@NAME with the attention factor of the search in place of its own; with validation documents
    search/heldout, search/heldout@NAME and search/heldout_same_attention@NAME.

    Raises: UserError for values out of range, no `ckpt`, a model whose positions cannot be extended, or too little text.
    """

    goes_on = True

    def __init__(
        self, target_len: int, objective: str, documents: int, validation_documents: int, depths: list[float], length: int | None,
        rows: int, population: int, iterations: int, parents: int, mutations: int, crossovers: int, mutation_probability: float,
        r_moves: float, tries: int, budget: int | None, low: float, high: float, step: float, seeds: list[str], deploy: dict[str, Any],
        compare: dict[str, Any],
    ) -> None:  # fmt: skip
        for key, value, least in (("documents", documents, 1), ("validation_documents", validation_documents, 0), ("rows", rows, 1)):
            if value < least:
                raise UserError(f"task.{key}: {value}; at least {least} is allowed")
        if objective not in OBJECTIVES:
            raise UserError(f"task.objective: {objective!r} is not one of {', '.join(OBJECTIVES)}{nearest(objective, OBJECTIVES)}")
        if not depths or not all(0 <= depth <= 1 for depth in depths):
            raise UserError(f"task.depths: {depths}; allowed are numbers from 0, the beginning, to 1, right before the question")
        self.target_len, self.objective, self.depths, self.rows = target_len, objective, depths, rows
        self.length = target_len if length is None else length
        self.documents, self.validation_documents = documents, validation_documents
        self.evolution = Evolution(
            population=population, iterations=iterations, parents=parents, mutations=mutations, crossovers=crossovers,
            mutation_probability=mutation_probability, seed=0, r_moves=r_moves, tries=tries, budget=budget,
        )  # fmt: skip
        self.bounds = {"low": low, "high": high, "step": step}
        self.deploy, self.seeds = deploy, seeds
        self.compare = {name: node for name, node in compare.items() if node is not None}
        if FOUND in self.compare:
            raise UserError(f"task.compare: {FOUND!r} is the name of what the search finds; give that rule another")
        for name in seeds:
            if name not in self.compare:
                raise UserError(f"task.seeds: {name!r} is not in task.compare: {', '.join(self.compare)}{nearest(name, self.compare)}")

    def check(self, config: DictConfig, parts: Parts) -> None:
        """Refuse what cannot be searched."""
        refuse_unheard(config)
        if not config.ckpt:
            raise UserError("ckpt: null; random weights read nothing, with any factors; give a trained run, ckpt=RUN_DIR, or ckpt=last")
        refuse_several_tasks(parts)
        space = self.space(parts.model)
        self.deployed(space, [space.factor] * space.size)
        self.rules(space)
        self.make_documents(parts.data, parts.tokenizer, config.seed)

    def run(self, context: Context) -> dict[str, float]:
        """Search, then score the other rules. Rows of metrics.csv are one a generation; their step is the number of evaluations."""
        config = read_config(context.run_dir)
        space = self.space(context.model)
        scoring, held_out = self.make_documents(context.data, context.tokenizer, context.seed)
        rules = self.rules(space)
        factors_of = {name: list(spec.factors) or [1.0] * space.size for name, spec in rules.items()}
        progress = SearchProgress(context, config.progress.every_seconds, sum(len(document.ids) for document in scoring))
        self.announce(context, space)
        with autocast(context):
            result = self.search(context, space, scoring, [factors_of[name] for name in self.seeds], progress)
            found = self.deployed(space, list(result.factors))
            scores = self.score_rules(context, result, found, rules, scoring, held_out)
        partial = float(OmegaConf.select(config, "model.partial_rotary_factor", default=1.0))
        write_result(context.run_dir / RESULT_FILE, found, partial, result, scores)
        write_tables(context.run_dir / "tables", rules, found, partial)
        write_plots(context.run_dir, result, factors_of, space.complete_at(1), f"{config.name}: {context.run_dir.name}")
        say_table(result, scores, list(rules))
        self.doubt(context, result, scoring)
        self.say_next(context, config, space)
        return {
            "search/best": result.score, "search/r": result.r, "search/critical_index": space.complete_at(1),
            "search/evaluations": result.evaluations, "search/failed": result.failed, "search/seconds": progress.seconds,
            **{f"search/{key}": value for key, value in scores.items()},
        }  # fmt: skip

    def space(self, model: Any) -> Space:
        """What is searched for this model. Raises UserError when there is nothing to search."""
        spec: RopeSpec | None = getattr(model, "rope_spec", None)
        if spec is None:
            raise UserError("model.position: 'none'; a search needs a model with rotary positions, trained with model.position=rope")
        assert spec.original_len is not None
        trained, window = spec.original_len, getattr(model, "window", None)
        if not spec.plain:
            raise UserError(f"rope: {spec.rule!r} is what a search would replace; add rope=none to search from plain positions")
        if window == 0:
            raise UserError("model.layer_pattern: no layer of this model attends, so that factors have no effect; use one with attention")
        if window is not None and window <= trained:
            raise UserError(
                f"model.window: {window}; a token sees no farther back however long its row is, and rows of model.max_length={trained} had "
                "all such distances, so that factors have no effect; use a model in which a layer sees farther"
            )
        if self.target_len <= trained:
            raise UserError(
                f"task.target_len: {self.target_len}; allowed is more than the model was trained at, model.max_length={trained}"
            )
        if window is not None and window < self.target_len:
            raise UserError(f"task.target_len: {self.target_len}; model.window={window} is the longest distance; at most that is allowed")
        space = Space(spec.rotary_dim, spec.base, trained, self.target_len / trained, **self.bounds)
        least = space.r_max - space.r_min + 1 + len(self.seeds)
        if self.evolution.population < least and not self.evolution.r_moves:
            raise UserError(
                f"task.population: {self.evolution.population}; at least {least} is allowed here, one candidate for each r from "
                f"{space.r_min} to {space.r_max} and each of task.seeds (with task.r_moves above 0 any)"
            )
        return space

    def deployed(self, space: Space, factors: list[float]) -> RopeSpec:
        """How the model is to turn with `factors`. Raises UserError for an option without them, or documents that have no use of them."""
        if str(self.deploy.get("switch")).startswith("always_"):
            raise UserError(
                f"task.deploy.switch: {self.deploy['switch']}; a search is of two regimes; leave it out, and set rope.switch later"
            )
        spec = rope_spec("task.deploy", self.deploy, numbers_of(space), needs="factors", factor=space.factor, factors=factors)
        read = self.length - 1  # the last token is only predicted
        if spec.regime_of(read) != len(spec.regimes) - 1 or self.length > self.target_len:
            raise UserError(f"task.length: {self.length}; allowed is {space.original_len + 2} to task.target_len={self.target_len}")
        return spec

    def rules(self, space: Space) -> dict[str, RopeSpec]:
        """The specs of `compare`."""
        numbers = numbers_of(space)
        return {name: rope_spec(f"task.compare.{name}", node, numbers, factor=space.factor) for name, node in self.compare.items()}

    def make_documents(self, data: Data, tokenizer: Tokenizer, seed: int) -> tuple[list[Needle], list[Needle]]:
        """Documents to score candidates on, and further ones, which share no text with them."""
        count = self.documents + self.validation_documents
        questions: Questions | None = getattr(data, "questions", None)
        if questions is not None:
            own = [Needle(tuple(ids), answer_tokens, None) for ids, answer_tokens in questions(self.length, count, seed)]
            if self.rows > 1 and len({len(document.ids) for document in own}) > 1:
                raise UserError(f"task.rows: {self.rows}; the questions of this data differ in length; use 1")
            if (shortest := min(len(document.ids) for document in own)) < self.length:
                raise UserError(
                    f"task.length: {self.length}; questions of this data and tokenizer have as few as {shortest} tokens, and factors are "
                    "scored on full length; use a kind of data whose questions fill it, or text (data=stdlib)"
                )
            return own[: self.documents], own[self.documents :]
        text = text_ids(data, count * self.length, seed, "task.documents").tolist()
        made = needles(text, tokenizer, self.length, count, self.depths, seed)
        return made[: self.documents], made[self.documents :]

    def announce(self, context: Context, space: Space) -> None:
        """Say what is searched, and how much of it is there already."""
        evolution, log = self.evolution, context.run_dir / LOG_FILE
        context.progress(
            f"factors of {space.size} rotary pairs for rows of {self.target_len:,} tokens instead of {space.original_len:,} "
            f"(s = {space.factor:g}), free from pair r on, r = {space.r_min} to {space.r_max}"
        )
        context.progress(
            f"score: {self.objective} of {self.documents} documents of {self.length:,} tokens; {evolution.total:,} evaluations: "
            f"{evolution.population} candidates, then {evolution.iterations} generations of {evolution.children}"
        )
        if log.is_file() and (known := log.read_bytes().count(b"\n") - 1) > 0:
            context.progress(f"going on: {known:,} evaluations are in {log}")

    def search(
        self, context: Context, space: Space, scoring: Sequence[Needle], seeds: list[list[float]], progress: SearchProgress
    ) -> Result:
        """Run the evolution, or the rest of it."""
        provenance = {
            "weights": weights_digest(context.model), "documents": documents_digest(scoring), "objective": self.objective,
            "rows": self.rows, "device": context.device.type, "dtype": str(context.dtype).removeprefix("torch."), "deploy": self.deploy,
        }  # fmt: skip
        objective = OBJECTIVES[self.objective](scoring, self.rows)
        return search(
            of_factors(objective, context.model, lambda factors: self.deployed(space, factors)),
            space,
            replace(self.evolution, seed=context.seed),
            context.run_dir / LOG_FILE,
            seeds=seeds,
            provenance=provenance,
            on_evaluation=progress.on_evaluation,
            on_generation=progress.on_generation,
        )

    def score_rules(
        self, context: Context, result: Result, found: RopeSpec, rules: Mapping[str, RopeSpec], scoring: Sequence[Needle],
        held_out: Sequence[Needle],
    ) -> dict[str, float]:  # fmt: skip
        """Scores of the other rules on the same documents, and of all on the held-out ones; each is kept in a log of their own."""
        wanted: dict[str, tuple[RopeSpec, Sequence[Needle]]] = {"heldout": (found, held_out)} if held_out else {}
        for title, documents in (("score", scoring), ("heldout", held_out)):
            for name, spec in rules.items() if documents else ():
                alike = replace(spec, regimes=(RopeRegime(spec.factors, found.attention_factor),))
                wanted |= {f"{title}@{name}": (spec, documents), f"{title}_same_attention@{name}": (alike, documents)}
        settings = {"factors": result.factors, "settings": result.settings, "compare": self.compare, "heldout": documents_digest(held_out)}
        with Log(context.run_dir / COMPARE_FILE, settings) as log:
            for number, (key, (spec, documents)) in enumerate(wanted.items()):
                if number not in log.entries:
                    log.entries[number] = {"id": number, "key": key, "score": self.score(context.model, spec, documents)}
                    log.append(log.entries[number])
                    context.progress()
            scores = {entry["key"]: entry["score"] for entry in log.entries.values()}
        return {key: math.inf if score is None else score for key, score in scores.items()}

    def score(self, model: Any, spec: RopeSpec, documents: Sequence[Needle]) -> float | None:
        """The objective's value; None where it has no finite one."""
        try:
            with turned_by(model, spec):
                score = OBJECTIVES[self.objective](documents, self.rows)(model)
        except FAILURES:
            return None
        return score if math.isfinite(score) else None

    def doubt(self, context: Context, result: Result, scoring: Sequence[Needle]) -> None:
        """Say so when the model finds no needle with any factors: then their order is noise."""
        if scoring[0].depth is None:  # of the data's own kind: what guessing would reach is not known
            return
        guess = guess_perplexity(scoring)
        if OBJECTIVES[self.objective] is needle_perplexity and result.score >= guess:
            context.progress(
                f"warning: the best score is no better than guessing the number, {guess:.5g}: these weights find no needle at this length, "
                "so that their scores say little of factors; train them longer, lower task.target_len, or try task.objective=token_ppl"
            )

    def say_next(self, context: Context, config: DictConfig, space: Space) -> None:
        """Where the factors are, and how to use them."""
        file = context.run_dir / RESULT_FILE
        rope = " ".join([shlex.quote(f"ckpt={hydra(str(config.ckpt))}"), *rope_words(self.deploy, factor=space.factor, factors=str(file))])
        typed = typed_before(context.run_dir)
        data = [word for word in typed if re.match(r"data(\.|=)", word) and not re.match(r"data\.(seq_len|length|shortest)=", word)]
        if any(word.startswith("experiment=") for word in typed):  # its data is not in the words
            data = ["data=text", "data.path=FILE"]
        mixed = [f"data.window_mix={{short_len: {space.original_len}, long_share: 0.5}}"] if "window_mix" in config.data else []
        context.closing += [
            f"factors: {file}; pictures beside it: factors.png, search.png",
            f"next: python train.py {rope} {shlex.join([*data, f'data.seq_len={self.target_len}', *mixed])}",
            f"or:   python generate.py {rope} prompt='...'   (as they are, without further training)",
        ]


def numbers_of(space: Space) -> dict[str, Any]:
    """The model's numbers that a RoPE rule starts from."""
    return {"rotary_dim": space.rotary_dim, "base": space.base, "original_len": space.original_len}
