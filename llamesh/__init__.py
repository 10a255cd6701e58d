"""llamesh: a peer-to-peer mesh of llama-server supervisors behind one OpenAI API."""

__version__ = "0.1.0"
