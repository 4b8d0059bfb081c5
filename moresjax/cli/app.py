"""The command line as a whole: which subcommands there are, and how their mistakes are told."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from moresjax._version import __version__
from moresjax.cli import (
    analyze,
    compare,
    data,
    demo,
    evaluate,
    export,
    generate,
    import_,
    params,
    plan,
    recipes,
    report,
