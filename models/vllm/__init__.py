"""The student on vLLM: in this process or behind URLs, with weights that follow the learner."""
