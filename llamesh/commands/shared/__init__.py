"""What several commands need.

- `options`, `named`: options and what they come to; `node`: those that say which node is meant; `completing`.
- `client`, `acts`, `answering`, `following`: talking to that node. `dialling`: to nodes of a mesh, as a peer.
- `saying`, `failed`, `exit_codes`, `words`: what is told, and how a command ends.
- `sheets`, `screen`, `views`: tables, how they are drawn, and those of the mesh's state.
- `shelf`: the weights on this disk.
"""
