"""The `moresjax` command: one file per subcommand, and `app` that gathers them."""

from moresjax.cli.app import main as main
