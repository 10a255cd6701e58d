"""What `llamesh NAME` does is in the module NAME, whose `command` is a command of click.

`llamesh.cli` has the table of them and imports each when it is called. `shared/` is what several of them
need. What another program or machine is meant to take goes to stdout, everything else to stderr. Exit codes
are those of `exit_codes`, but where a command says otherwise.
"""
