"""Engines on vLLM: students in this process or behind URLs, with weights that follow the learner, and teachers."""
