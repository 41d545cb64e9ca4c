"""Four tasks of RULER as prompts of a given length: niah_single_2, niah_multikey_1, vt and qa_1.

The wording, the sources, the numbers and the placing are RULER's; the haystack is sized to the token rather
than in RULER's steps of 500 words or 10 documents, so that short contexts are full as well.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.quality.ruler.material import Material, Template, sentences

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_NUM_DEPTHS = 40
_HOPS = 4
_EXAMPLE_TOKENS = 470


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt of a task.

    Args:
        user: What the user says.
        answer_prefix: How the answer begins, given to the model.
        answers: What must be found.
        max_new_tokens: Length of the answer.
    """

    user: str
    answer_prefix: str
    answers: list[str]
    max_new_tokens: int


CountTokens = Callable[[Sample], int]
Make = Callable[[int], Sample]
"""A sample with so many pieces of haystack; the same pieces give the same sample."""


def largest(make: Make, count_tokens: CountTokens, num_tokens: int, most: int) -> Sample:
    """The sample with the largest haystack that leaves room for its answer.

    Raises:
        ValueError: Not even an empty haystack fits.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        sample = make(middle)
        if count_tokens(sample) + sample.max_new_tokens <= num_tokens:
            low = middle
        else:
            high = middle - 1
    sample = make(low)
    if count_tokens(sample) + sample.max_new_tokens > num_tokens:
        raise ValueError(f"{num_tokens} tokens are too few for this task; ask for longer contexts")
    return sample


def needle(material: Material, seed: int, num_keys: int) -> Make:
    """A number to be found by its key in essays, among `num_keys` of them."""
    template = _singular(material.templates["niah"])

    def make(num_words: int) -> Sample:
        chance = random.Random(seed)
        pairs = [(chance.choice(material.adjectives), chance.choice(material.nouns)) for _ in range(num_keys)]
        keys = [f"{adjective}-{noun}" for adjective, noun in pairs]
        numbers = [str(chance.randint(10**6, 10**7 - 1)) for _ in keys]
        depths = chance.sample(range(_NUM_DEPTHS), num_keys)
        asked = chance.randrange(num_keys)
        hidden = [_NEEDLE.format(key=key, value=value) for key, value in zip(keys, numbers, strict=True)]
        text = sentences(" ".join(material.essay_words[:num_words]))
        places = sorted(int(len(text) * depth / (_NUM_DEPTHS - 1)) for depth in depths)
        for place, line in sorted(zip(places, hidden, strict=True), reverse=True):
            text.insert(place, line)
        words = {"context": " ".join(text), "query": keys[asked], "type_needle_v": "number"}
        return _sample(template, [numbers[asked]], words)

    return make


def variable_tracking(material: Material, seed: int, count_tokens: CountTokens) -> Make:
    """Names of all variables that got a value over four hops, after one example of the same kind."""
    template = material.templates["variable_tracking"]
    chance = random.Random(seed)
    short = largest(
        _chain(template, chance.random(), 3, ""), count_tokens, _EXAMPLE_TOKENS, _EXAMPLE_TOKENS // 10
    )
    example = f"{short.user}{short.answer_prefix} {' '.join(short.answers)}\n\n"
    return _chain(template, chance.random(), 5, example)


def _chain(template: Template, seed: float, letters: int, example: str) -> Make:
    def make(num_noises: int) -> Sample:
        chance = random.Random(seed)
        names: list[str] = []
        while len(names) <= _HOPS:
            name = "".join(chance.choices(string.ascii_uppercase, k=letters))
            names += [name] * (name not in names)
        value = str(chance.randint(10_000, 99_998))
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {names[hop + 1]} = VAR {names[hop]} " for hop in range(_HOPS)]
        text = [_NOISE] * num_noises
        places = sorted(chance.choices(range(num_noises + 1), k=len(lines)))
        for place, line in reversed(list(zip(places, lines, strict=True))):
            text.insert(place, line)
        context = " ".join(text).replace(". \n", ".\n")
        words = {"context": context, "query": value, "num_v": str(_HOPS + 1)}
        sample = _sample(template, names, words)
        return Sample(
            user=example + sample.user,
            answer_prefix=sample.answer_prefix,
            answers=names,
            max_new_tokens=sample.max_new_tokens,
        )

    return make


def question_answering(material: Material, seed: int) -> Make:
    """A question of SQuAD among paragraphs of its own article first, then of others."""
    template, question = material.templates["qa"], material.questions[seed]
    own = {question.document, *question.related}

    def make(num_more: int) -> Sample:
        chance = random.Random(seed)
        related = chance.sample(question.related, len(question.related))
        foreign = [number for number in range(len(material.documents)) if number not in own]
        others = (related + chance.sample(foreign, len(foreign)))[:num_more]
        numbers = [question.document, *others]
        random.Random(seed).shuffle(numbers)
        documents = (
            f"Document {place}:\n{material.documents[number]}" for place, number in enumerate(numbers, 1)
        )
        words = {"context": "\n\n".join(documents), "query": question.text}
        return _sample(template, question.answers, words)

    return make


def _singular(template: Template) -> Template:
    """RULER's wording of a needle task for one number."""
    wording = [template.question, template.answer_prefix]
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
        wording = [text.replace(plural, singular) for text in wording]
    return Template(question=wording[0], answer_prefix=wording[1], max_new_tokens=template.max_new_tokens)


def _sample(template: Template, answers: list[str], words: dict[str, str]) -> Sample:
    return Sample(
        user=template.question.format(**words),
        answer_prefix=template.answer_prefix.format(**words),
        answers=answers,
        max_new_tokens=template.max_new_tokens,
    )


TASKS = ("niah_single_2", "niah_multikey_1", "vt", "qa_1")


def sample_of(
    task: str, material: Material, index: int, num_tokens: int, count_tokens: CountTokens
) -> Sample:
    """Sample `index` of a task, with its answer at most `num_tokens` long.

    Raises:
        ValueError: No such task, or too few tokens.
    """
    match task:
        case "niah_single_2":
            make, most = needle(material, index, num_keys=1), num_tokens
        case "niah_multikey_1":
            make, most = needle(material, index, num_keys=4), num_tokens
        case "vt":
            make, most = variable_tracking(material, index, count_tokens), num_tokens // 10
        case "qa_1":
            make, most = question_answering(material, index), num_tokens // 20
        case _:
            raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
    # `most` is beyond what fits: a word is a token or more, a line of noise ten, a paragraph twenty
    return largest(make, count_tokens, num_tokens, most)
