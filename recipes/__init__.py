"""The things a user runs: `python -m recipes.NAME key=value …`. The only place where everything meets."""

from transformers.utils import logging

logging.disable_progress_bar()  # of loading and saving: the recipes show their own progress
