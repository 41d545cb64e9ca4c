"""Writes what `tq-store plan` prints into deploy/PLANNING.md; a test sees that it is current."""

import re
from pathlib import Path

from tq_store.plan import Question, describe
from tq_store.sizing import read_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "deploy" / "PLANNING.md"
_MODEL = Path("benchmarks/models/llama-3.1-8b.json")
_BLOCK = re.compile(r"(<!-- plan: .*? -->\n).*?(<!-- end of plan -->)", re.DOTALL)


def example() -> str:
    """The command and what it prints, as Markdown."""
    question = Question(
        model=read_model(ROOT / _MODEL), context=32_768, replicas=4, link_gbit=10.0, client_gib_per_s=4.0
    )
    command = f"tq-store plan --model {_MODEL} --context 32768 --replicas 4 --link 10 --client 4"
    lines = "\n".join(f"    {line}".rstrip() for line in describe(question))
    return f"    $ {command}\n{lines}\n"


def current(text: str) -> str:
    """The page with the example as it would be printed now."""
    return _BLOCK.sub(lambda match: match[1] + example() + match[2], text)


if __name__ == "__main__":
    PAGE.write_text(current(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
