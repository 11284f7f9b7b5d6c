"""The text of a run on a terminal, while its agents write it."""

import click

from flock.runs import Event

__all__ = ["LivePrinter"]


class LivePrinter:
    """Prints the text of each field to stdout, and what else happens to stderr. Call it with each event of a run."""

    def __init__(self) -> None:
        self._field: tuple[int, str] | None = None

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.name == "call.started":
            self._print_note(f"{data['agent_name']} calls {data['name']}")
        elif event.name == "output.reset" and "call_id" not in data:
            self._print_note(f"{data['agent_name']} starts again")
        elif event.name == "output.delta" and "call_id" not in data:
            field = data["position"], data["field"]
            if field != self._field:
                self.end_line()
            self._field = field
            click.echo(data["text"], nl=False)

    def _print_note(self, text: str) -> None:
        self.end_line()
        click.secho(text, dim=True, err=True)

    def end_line(self) -> None:
        """End the line of the last text, if there is any."""
        if self._field is not None:
            click.echo()
            self._field = None
