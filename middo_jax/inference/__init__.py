"""The embedded engine, which answers prompts on the whole mesh, and its OpenAI-compatible HTTP server."""
