"""A client of any OpenAI-compatible server: it is given messages, and knows neither prompts nor axes."""
