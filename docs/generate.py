"""Fill the generated parts of the reference's pages: `python -m docs.generate`

A page is prose with marks in it. What stands between

    <!-- generated: rest.request_fields GenerateRequest -->
    <!-- generated: end -->

is made by that function of docs/tables, with the rest of the line as its arguments; everything else is kept by hand. A
test does the same and compares, so that a page can say nothing of a field, an option or a series that is not so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from docs.tables import client, options, rest, rpc, series

DOCS = Path(__file__).parent
_MARKED = re.compile(
    r"^(?P<mark><!-- generated: (?P<name>\w+\.\w+)(?P<arguments>[^>\n]*) -->)\n.*?^(?P<end><!-- generated: end -->)$",
    re.MULTILINE | re.DOTALL,
)
_TABLES: dict[str, Callable[..., str]] = {
    "client.asynchronous": client.asynchronous,
    "client.fields": client.fields,
    "client.methods": client.methods,
    "options.options": options.options,
    "rest.errors": rest.errors,
    "rest.request_fields": rest.request_fields,
    "rest.response_fields": rest.response_fields,
    "rest.routes": rest.routes,
    "rpc.messages": rpc.messages,
    "rpc.methods": rpc.methods,
    "rpc.statuses": rpc.statuses,
    "series.buckets": series.buckets,
    "series.label_values": series.label_values,
    "series.series": series.series,
}


def filled(text: str) -> str:
    """The page with its generated parts as they are now.

    Raises:
        KeyError: a mark names what is not there.
    """

    def fill(found: re.Match[str]) -> str:
        return f"{found['mark']}\n\n{_TABLES[found['name']](*found['arguments'].split())}\n\n{found['end']}"

    return _MARKED.sub(fill, text)


def pages() -> list[Path]:
    return sorted(DOCS.glob("*.md"))


def main() -> int:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(DOCS.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
