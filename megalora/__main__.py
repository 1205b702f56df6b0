"""``python -m megalora`` is the ``megalora`` command."""

from megalora.cli.main import main

main()
