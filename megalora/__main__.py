"""``python -m megalora`` is the ``megalora`` command."""

from megalora.cli import main

main()
