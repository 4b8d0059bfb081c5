"""A model behind OpenAI's HTTP API, with continuous batching, and the page that talks to it.

`docs/reference/serve.md` describes the API: its endpoints, fields and what they add to OpenAI's.
"""
