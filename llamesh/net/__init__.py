"""HTTP/1.1 on raw non-blocking sockets: the parts that both the local and the mesh side relay through."""
