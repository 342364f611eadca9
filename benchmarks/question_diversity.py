"""How diverse the questions of `data=concepts_world` are: different questions and pairs of concepts, and similarity within their source.

`python -m benchmarks.question_diversity` (one thread, half a minute). The source of a question is its document, at level 3 the walk that it
comes from; similarity is the mean cosine of hashed tf-idf over pairs of questions of one source (SynthLLM, arXiv 2503.19551, sec. 4.3, with
this embedder in place of a sentence encoder).
"""

from __future__ import annotations

import argparse

from benchmarks.common import append_row, environment, table
from components.data.concepts_world import ConceptsWorld

BYTES = {"kind": "bytes", "vocab_size": 320, "path": None}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--chapters", type=int, default=120)
    parser.add_argument("--held-out", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument("--smoke", action="store_true", help="a tiny world; writes nothing")
    options = parser.parse_args(argv)
    if options.smoke:
        options.sizes, options.documents, options.chapters = [32, 64], 20, 10
    found = []
    for level in (1, 2, 3):
        for size in options.sizes:
            data = ConceptsWorld(
                level, size, options.documents, options.chapters, options.held_out, val_samples=1, seed=options.seed, tokenizer=BYTES,
                seq_len=72, batch_size=8, num_workers=0,
            )  # fmt: skip
            found.append({"level": level, "questions": size, **data.diversity()})
    cells = [
        [str(row["level"]), f"{row['questions']:,}", f"{row['distinct_questions']:,}", f"{row['distinct_pairs']:,}",
         f"{row['distinct_pairs'] / row['possible_pairs']:.1%}", f"{row['within_source_cosine']:.3f}"]
        for row in found
    ]  # fmt: skip
    print(
        table(["level", "questions", "different", "pairs of concepts", f"of {found[0]['possible_pairs']:,}", "cosine in a source"], cells)
    )
    if not options.smoke:
        print(f"row appended to {append_row('question_diversity', {**environment('numpy'), **vars(options), 'rows': found})}")


if __name__ == "__main__":
    main()
