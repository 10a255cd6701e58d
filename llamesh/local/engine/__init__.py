"""The embedded engine: llama.cpp's own server from the xllamacpp wheel, as a child process.

`python -m llamesh.local.engine FLAGS` takes llama-server's flags and answers like it, so that a node
makes tokens with nothing but pip; a real llama-server replaces it by being there.
"""
