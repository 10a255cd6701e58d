"""What `llamesh NAME` does is in the module or package NAME, whose `command` is a command of click.

Only `import` isn't named like it, since no module can be: it is in `convert`. `llamesh.cli` has the table of
them and imports each when it is called. `config_edit` is how `join` changes a configuration; `shared/` is
what several of them need, `shared/options.py` and `shared/node.py` first of all.

A command returns its exit code, one of `shared/exit_codes.py`, or raises `shared.failed.Failed`. What another
program or machine is meant to take goes to stdout, everything else to stderr.
"""
