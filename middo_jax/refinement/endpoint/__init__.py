"""A client of any OpenAI-compatible server. It sends messages; it does not depend on prompts or axes."""
