"""`/mcp`: the node as a server of the Model Context Protocol, so that an assistant can look after the mesh.

`endpoint` is there from the start. The rest, and the SDK with its 25 MiB, is imported when `/mcp` is first
asked for.
"""
