"""Views of the latents that fire in a prompt: a table, a page for notebooks, and a live view with steering sliders."""

from saelens_lite.views.prompt import PromptRow, PromptView, prompt_view

__all__ = ["PromptRow", "PromptView", "prompt_view"]
