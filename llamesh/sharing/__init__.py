"""Weights between nodes: what joins the downloads of this machine to the peers of the mesh."""
