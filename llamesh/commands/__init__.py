"""Commands that set up a mesh from a shell: `token`, `key`, `invite`, `join`.

What another program or machine is meant to take goes to stdout, everything else to stderr. Exit
codes: 0 done; 1 couldn't be done, with the reason on stderr; `join` also 3.
"""
