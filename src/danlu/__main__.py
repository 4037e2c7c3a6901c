"""``python -m danlu`` is the ``danlu`` command, which lets ``torchrun`` start it."""

from danlu.cli import app

app(prog_name="danlu")
