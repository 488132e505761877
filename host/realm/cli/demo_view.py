"""How the demo shows three streams: side by side on a terminal, as labelled lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from realm.cli.terminal import printable

STYLES = ("cyan", "magenta", "yellow")
_HEIGHT = 18


class StreamView:
    """Shows text by tenant as it comes. Use it as a context manager."""

    def __init__(self, console: Console, titles: dict[str, str]) -> None:
        """``titles`` has what stands above each tenant's text."""
        self._console = console
        self._titles = titles
        self._texts = dict.fromkeys(titles, "")
        self._pending = dict.fromkeys(titles, "")
        self._live: Live | None = None

    def __enter__(self) -> StreamView:
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, refresh_per_second=12, vertical_overflow="crop")
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._render())
            self._live.__exit__(kind, error, traceback)
        else:
            for tenant in self._titles:
                self._line(tenant, final=True)

    def add(self, tenant: str, text: str) -> None:
        """More of a tenant's text."""
        text = printable(text)
        self._texts[tenant] += text
        if self._live is not None:
            self._live.update(self._render())
            return
        self._pending[tenant] += text
        # Long enough to read, short enough to see that the streams interleave.
        if "\n" in text or len(self._pending[tenant]) >= 48:
            self._line(tenant)

    def end(self, tenant: str) -> None:
        """A tenant's text is complete."""
        if self._live is None:
            self._line(tenant, final=True)

    def _line(self, tenant: str, final: bool = False) -> None:
        text = self._pending[tenant]
        # Whole words only, so that a line can be read.
        cut = len(text) if final or "\n" in text else text.rfind(" ") + 1
        if not text[:cut].strip():
            return
        self._pending[tenant] = text[cut:]
        for line in text[:cut].splitlines():
            if line.strip():
                sys.stdout.write(f"{tenant:>10} | {line.strip()}\n")
        sys.stdout.flush()

    def _render(self) -> RenderableType:
        width = max(20, self._console.width // len(self._titles))
        row = Table.grid(expand=True)
        panels: list[Panel] = []
        for (tenant, title), style in zip(self._titles.items(), STYLES, strict=True):
            row.add_column(ratio=1)
            lines = Text(self._texts[tenant]).wrap(self._console, width - 4)[-(_HEIGHT - 2) :]
            panels.append(Panel(Group(*lines), title=f"{tenant}: {title}", border_style=style, height=_HEIGHT))
        row.add_row(*panels)
        return row
