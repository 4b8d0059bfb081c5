"""The parent module of plug-ins that are files: `my.py` is `moresjax.core.plugin_files.my`.

Importing it loads them. Python imports a parent before its child, so an object of a plug-in can be
unpickled in a process that has not looked up any name yet.
"""

from moresjax.core.plugins import load_plugins

load_plugins()
