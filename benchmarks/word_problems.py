"""Arithmetic word problems in the style of GSM8K: generated from templates, of two or three steps each.

They are not GSM8K: nobody wrote them by hand, and their numbers are small enough for small models to be right
now and then. A prompt has worked examples, and an answer ends in "The answer is N."
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

NUM_EXAMPLES = 8
MAX_NEW_TOKENS = 128
_EXAMPLES_SEED = 2026
_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Kira", "Liam")
_THINGS = ("apples", "books", "cards", "coins", "marbles", "pencils", "shells", "stamps", "stickers", "toys")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_SAID = re.compile(rf"answer is[^\d\n-]*{_NUMBER.pattern}", re.IGNORECASE)
_NEXT_QUESTION = "Question:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A word problem.

    Args:
        question: What is asked.
        steps: A worked answer, up to its last sentence.
        answer: The number.
    """

    question: str
    steps: str
    answer: int


def problem_of(index: int) -> Problem:
    """Problem `index`; the same index gives the same problem."""
    chance = random.Random(index)
    return chance.choice(_TEMPLATES)(chance)


def prompt_text(problem: Problem) -> str:
    """The question after worked examples, one of each of the first templates, the same for all problems."""
    chance = random.Random(_EXAMPLES_SEED)
    examples = [template(chance) for template in _TEMPLATES[:NUM_EXAMPLES]]
    shown = [f"Question: {e.question}\nAnswer: {e.steps} The answer is {e.answer}." for e in examples]
    return "\n\n".join([*shown, f"Question: {problem.question}"])


def is_right(written: str, answer: int) -> bool:
    """Whether the last number is the right one; nothing after "The answer is N" counts."""
    said = _SAID.search(written)
    numbers = _NUMBER.findall(written[: said.end()] if said else written.partition(_NEXT_QUESTION)[0])
    return bool(numbers) and float(numbers[-1].replace(",", "")) == answer


def _who(chance: random.Random) -> tuple[str, str, str]:
    """Two people and what they have."""
    one, other = chance.sample(_NAMES, 2)
    return one, other, chance.choice(_THINGS)


def _given_away(chance: random.Random) -> Problem:
    one, other, things = _who(chance)
    given, more = chance.randint(2, 9), chance.randint(2, 12)
    had = given + chance.randint(2, 12)
    left = had - given
    return Problem(
        question=f"{one} has {had} {things}. {one} gives {given} of them to {other} and then buys "
        f"{more} more. How many {things} does {one} have now?",
        steps=f"After giving {given} to {other}, {one} has {had} - {given} = {left} {things}. "
        f"After buying {more} more, {one} has {left} + {more} = {left + more} {things}.",
        answer=left + more,
    )


def _boxes(chance: random.Random) -> Problem:
    one, _, things = _who(chance)
    boxes, each = chance.randint(2, 6), chance.randint(3, 10)
    lost = chance.randint(2, boxes * each // 2)
    total = boxes * each
    return Problem(
        question=f"{one} has {boxes} boxes with {each} {things} in each box. {one} loses {lost} of the "
        f"{things}. How many {things} are left?",
        steps=f"The boxes hold {boxes} * {each} = {total} {things}. "
        f"After losing {lost}, there are {total} - {lost} = {total - lost} {things} left.",
        answer=total - lost,
    )


def _change(chance: random.Random) -> Problem:
    one, _, things = _who(chance)
    number, price = chance.randint(2, 6), chance.randint(2, 6)
    cost = number * price
    paid = (cost // 10 + chance.randint(1, 3)) * 10
    return Problem(
        question=f"{one} buys {number} {things} that cost ${price} each and pays with ${paid}. "
        f"How many dollars does {one} get back?",
        steps=f"The {things} cost {number} * {price} = {cost} dollars. "
        f"{one} gets back {paid} - {cost} = {paid - cost} dollars.",
        answer=paid - cost,
    )


def _together(chance: random.Random) -> Problem:
    one, other, things = _who(chance)
    number, times = chance.randint(3, 12), chance.randint(2, 4)
    more = number * times
    return Problem(
        question=f"{one} has {number} {things}. {other} has {times} times as many {things} as {one}. "
        f"How many {things} do they have together?",
        steps=f"{other} has {times} * {number} = {more} {things}. "
        f"Together they have {number} + {more} = {number + more} {things}.",
        answer=number + more,
    )


def _shared(chance: random.Random) -> Problem:
    one, other, things = _who(chance)
    friends, each = chance.randint(2, 6), chance.randint(3, 9)
    total = friends * each
    first = chance.randint(2, total - 2)
    return Problem(
        question=f"{one} has {first} {things} and {other} has {total - first} {things}. They put them "
        f"together and share them equally among {friends} friends. How many {things} does each friend get?",
        steps=f"Together they have {first} + {total - first} = {total} {things}. "
        f"Each friend gets {total} / {friends} = {each} {things}.",
        answer=each,
    )


def _weeks(chance: random.Random) -> Problem:
    one, _, _ = _who(chance)
    pages, days, before = chance.randint(3, 12), chance.randint(2, 6), chance.randint(5, 30)
    read = pages * days
    return Problem(
        question=f"{one} has read {before} pages of a book and reads {pages} pages every day. "
        f"How many pages has {one} read after {days} more days?",
        steps=f"In {days} days, {one} reads {days} * {pages} = {read} pages. "
        f"With those before, that is {before} + {read} = {before + read} pages.",
        answer=before + read,
    )


def _wages(chance: random.Random) -> Problem:
    one, _, _ = _who(chance)
    wage, monday, tuesday = chance.randint(5, 12), chance.randint(2, 5), chance.randint(2, 5)
    hours = monday + tuesday
    return Problem(
        question=f"{one} earns ${wage} an hour. {one} works {monday} hours on Monday and {tuesday} hours on "
        f"Tuesday. How many dollars does {one} earn?",
        steps=f"{one} works {monday} + {tuesday} = {hours} hours. "
        f"{one} earns {hours} * {wage} = {hours * wage} dollars.",
        answer=hours * wage,
    )


def _half(chance: random.Random) -> Problem:
    one, other, things = _who(chance)
    half, found = chance.randint(3, 15), chance.randint(2, 10)
    all_three = 3 * half + found
    return Problem(
        question=f"{one} collects {2 * half} {things}. {other} collects half as many {things} as {one}, "
        f"and then finds {found} more. How many {things} do they have in total?",
        steps=f"{other} collects {2 * half} / 2 = {half} {things}. "
        f"After finding {found} more, {other} has {half} + {found} = {half + found} {things}. "
        f"In total they have {2 * half} + {half + found} = {all_three} {things}.",
        answer=all_three,
    )


def _shop(chance: random.Random) -> Problem:
    morning, sold, more = chance.randint(20, 40), chance.randint(5, 15), chance.randint(5, 20)
    late = chance.randint(1, 5)
    left = morning - sold
    return Problem(
        question=f"A shop has {morning} cakes in the morning. It sells {sold} cakes before noon, bakes "
        f"{more} more, and sells {late} in the afternoon. How many cakes are left?",
        steps=f"Before noon, {morning} - {sold} = {left} cakes are left. "
        f"With those that are baked, there are {left} + {more} = {left + more} cakes. "
        f"In the end, {left + more} - {late} = {left + more - late} cakes are left.",
        answer=left + more - late,
    )


def _rows(chance: random.Random) -> Problem:
    rows, seats, taken = chance.randint(3, 9), chance.randint(4, 10), chance.randint(2, 11)
    total = rows * seats
    return Problem(
        question=f"A bus has {rows} rows with {seats} seats each. {taken} seats are taken. "
        "How many seats are free?",
        steps=f"The bus has {rows} * {seats} = {total} seats. "
        f"There are {total} - {taken} = {total - taken} free seats.",
        answer=total - taken,
    )


def _savings(chance: random.Random) -> Problem:
    one, _, _ = _who(chance)
    weekly, weeks, spent = chance.randint(3, 10), chance.randint(3, 8), chance.randint(2, 8)
    saved = weekly * weeks
    return Problem(
        question=f"{one} saves ${weekly} a week for {weeks} weeks and then spends ${spent} on a gift. "
        f"How many dollars does {one} have left?",
        steps=f"{one} saves {weeks} * {weekly} = {saved} dollars. "
        f"After the gift, {one} has {saved} - {spent} = {saved - spent} dollars left.",
        answer=saved - spent,
    )


def _ages(chance: random.Random) -> Problem:
    one, other, _ = _who(chance)
    age, older, years = chance.randint(5, 30), chance.randint(2, 15), chance.randint(2, 10)
    return Problem(
        question=f"{one} is {age} years old. {other} is {older} years older than {one}. "
        f"How old will {other} be in {years} years?",
        steps=f"{other} is {age} + {older} = {age + older} years old. "
        f"In {years} years, {other} will be {age + older} + {years} = {age + older + years} years old.",
        answer=age + older + years,
    )


_TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    _given_away,
    _boxes,
    _change,
    _together,
    _shared,
    _weeks,
    _wages,
    _half,
    _shop,
    _rows,
    _savings,
    _ages,
)
