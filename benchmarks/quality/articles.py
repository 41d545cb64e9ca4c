"""Plain text of Wikipedia articles, for perplexity: the extract in the gensim wheel, less its markup."""

import bz2
import html
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.quality.wheel_data import WIKIPEDIA, fetch

_NOT_TEXT = ("File:", "Image:", "Category:")
_TEXT = re.compile(r"<text xml:space=\"preserve\">(.*?)</text>", re.DOTALL)
_DROPPED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|timeline|code|pre|table)\b.*?</\1>|<[^>]+>",
    re.DOTALL,
)
_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_OUTER_LINK = re.compile(r"\[https?://\S*\s*([^\]]*)\]")
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+\s*", re.MULTILINE)


def plain_text(markup: str) -> str:
    """Prose of an article in wiki markup: no templates, tables, references or files."""
    text = _DROPPED.sub("", html.unescape(markup))
    for pattern, replacement in ((_INNERMOST, ""), (_LINK, _label)):
        before = None
        while before != text:
            before, text = text, pattern.sub(replacement, text)
    text = _OUTER_LINK.sub(r"\1", text).replace("'''", "").replace("''", "")
    text = _LIST_MARK.sub("", _HEADING.sub(r"\2", text))
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _label(link: re.Match[str]) -> str:
    return "" if link[1].startswith(_NOT_TEXT) else link[1].rpartition("|")[2]


def articles(path: Path) -> Iterator[str]:
    """Plain text of every article of an extract, in its order, redirects left out."""
    for match in _TEXT.finditer(bz2.decompress(path.read_bytes()).decode()):
        if not match[1].lstrip().upper().startswith("#REDIRECT"):
            yield plain_text(match[1])


def token_sequences(tokenizer: Any, count: int, num_tokens: int, path: Path | None = None) -> list[list[int]]:
    """The first `num_tokens` tokens of each of the first articles that have so many.

    Args:
        tokenizer: Of the model.
        count: Sequences wanted.
        num_tokens: Length of each.
        path: An extract; None for the pinned one.

    Raises:
        ValueError: There are fewer such articles.
    """
    tokenized = (
        list(tokenizer(text[: 16 * num_tokens])["input_ids"][:num_tokens])
        for text in articles(path or fetch(WIKIPEDIA))
        if len(text) > num_tokens
    )
    found = list(islice((ids for ids in tokenized if len(ids) == num_tokens), count))
    if len(found) < count:
        raise ValueError(
            f"only {len(found)} articles have {num_tokens} tokens; ask for fewer or shorter texts"
        )
    return found
