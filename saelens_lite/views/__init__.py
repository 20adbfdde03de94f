"""Views of a prompt: which latents fire in it, as a table or a page for notebooks, and live with sliders to steer."""

from saelens_lite.views.prompt import PromptRow, PromptView, prompt_view

__all__ = ["PromptRow", "PromptView", "prompt_view"]
