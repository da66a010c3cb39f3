"""The three signals: complexity, diversity, quality; and what they select."""
