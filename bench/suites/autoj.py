"""Auto-J's pairwise test (Li et al., ICLR 2024): 58 scenarios in 8 groups, human labels, ties among them.

Official rule (`codes/leaderboard/pairwise_eval.py`, type "pairwise"): agreement is the share of pairs on
which both orders say the label, over all pairs, those labelled a tie included; consistency the share on
which the orders agree. Where one order is judged (type "single") agreement is the share on which it says the
label. A judge that never says "tie" cannot reach the tied pairs, so agreement without ties is reported beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gramlite.bench import records, scoring

from gramlite.judging.pair import Pair, Winner

SOURCE = (
    "Get data/test/testdata_pairwise.jsonl from github.com/GAIR-NLP/auto-j: JSON lines with scenario, prompt, "
    "'response 1', 'response 2' and a label of 0 (first), 1 (second) or 2 (tie)."
)
FILES = ("testdata_pairwise.jsonl", "autoj.jsonl")
LABELS: dict[str, Winner] = {"0": "A", "1": "B", "2": "tie"}
GROUPS = {
    "Summarization": "post_summarization text_summarization note_summarization",
    "Exam Questions": "math_reasoning solving_exam_question_with_math solving_exam_question_without_math",
    "Code": "code_simplification code_generation explaining_code code_correction_rewriting code_to_code_translation",
    "Rewriting": "text_simplification language_polishing instructional_rewriting text_correction paraphrasing",
    "Creative Writing": "writing_song_lyrics writing_social_media_post writing_blog_post writing_personal_essay "
    "creative_writing writing_advertisement writing_marketing_materials writing_presentation_script counterfactual",
    "Functional Writing": "writing_product_description writing_job_application writing_news_article writing_biography "
    "writing_email writing_legal_document writing_technical_document writing_scientific_paper functional_writing "
    "writing_cooking_recipe",
    "General Communication": "asking_how_to_question open_question analyzing_general explaining_general "
    "seeking_advice recommendation value_judgement verifying_fact chitchat roleplay planning brainstorming",
    "NLP Tasks": "ranking text_to_text_translation data_analysis classification_identification title_generation "
    "question_generation reading_comprehension keywords_extraction information_extraction topic_modeling others",
}
GROUP_OF = {scenario: group for group, scenarios in GROUPS.items() for scenario in scenarios.split()}
OFFICIAL = {group: 24 * len(scenarios.split()) for group, scenarios in GROUPS.items()}


def load(path: Path) -> Iterator[Pair]:
    """The pairs; the subset is the scenario's group, the scenario is in the meta."""
    for pair in records.read_pairs(path, _pairs):
        scenario = (pair.meta or {})["subset"]
        yield replace(
            pair, meta={**(pair.meta or {}), "subset": GROUP_OF.get(scenario, scenario), "scenario": scenario}
        )


def _pairs(record: records.Record, number: int, where: str) -> Iterator[Pair]:
    yield records.make_pair(
        identifier=f"autoj:{number - 1:04d}",
        prompt=records.text(record, "prompt", where),
        response_a=records.text(record, "response 1", where),
        response_b=records.text(record, "response 2", where),
        label=records.label(record, "label", LABELS, where, SOURCE),
        meta={"subset": records.text(record, "scenario", where)},
    )


def score(rows: Iterable[Any], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Agreement and consistency, overall and by group, and agreement on the pairs not labelled a tie."""
    matched = scoring.match(rows, pairs)
    untied = matched.where(lambda item: item.label != "tie")
    scores: dict[str, float | None] = {
        "agreement": scoring.both_right(matched.judged),
        "agreement_without_ties": scoring.both_right(untied),
        "accuracy_without_ties": scoring.accuracy(matched.judged),
    }
    if matched.both_orders:
        scores["consistency"] = scoring.mean(item.agreed is not None for item in matched.judged)
    for name, items in sorted(matched.by_subset().items()):
        scores[f"{name} agreement"] = scoring.both_right(items)
        if matched.both_orders:
            scores[f"{name} consistency"] = scoring.mean(item.agreed is not None for item in items)
    notes = scoring.official_size(pairs, OFFICIAL)
    ties = len(matched.judged) - len(untied)
    if ties:
        notes.append(f"{ties} pairs are labelled a tie, which a judge without ties always misses.")
    one = "Auto-J's agreement asks both: this is its script's type single."
    return scoring.result(matched, headline="agreement", scores=scores, notes=notes, one_order=one)
