"""Tables between the markers of a Markdown page: <!-- NAME --> and <!-- /NAME -->."""

import re
from pathlib import Path


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between a page's markers, wherever it has them; text ends with a newline."""
    marked = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    page.write_text(marked.sub(lambda match: match[1] + text + match[2], page.read_text()))
