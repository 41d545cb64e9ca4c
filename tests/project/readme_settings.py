"""The README's table of server settings, made from the declarations; run this file to rewrite it."""

from pathlib import Path

from tq_store.config import ServerConfig
from tq_store.settings import settings

README = Path(__file__).parents[2] / "README.md"
_BEGIN = "<!-- settings: rewritten by `python tests/project/readme_settings.py` -->\n"
_END = "<!-- end of settings -->\n"


def table() -> str:
    """Markdown rows, one per setting."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for setting in settings(ServerConfig).values():
        default = f"`{setting.shown_default}`" if setting.shown_default else ""
        rows.append(f"| `{setting.name}` | {default} | {setting.help} |")
    return "\n".join(rows) + "\n"


def parts() -> tuple[str, str, str]:
    """README before, within and after the table."""
    head, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
    within, _, tail = rest.partition(_END)
    return head, within, tail


if __name__ == "__main__":
    before, _, after = parts()
    README.write_text(f"{before}{_BEGIN}{table()}{_END}{after}", encoding="utf-8")
