"""Look at a prompt: which latents fire in it, in notebooks and terminals, or live with sliders to steer.

```python
view = sl.prompt_view(d, lm, "The old man said that", "attribution", store=store)  # a notebook shades the tokens
```

```sh
saelens-lite prompt runs/topk/dictionary --prompt "The old man said" --by attribution
```

Latents are ranked by activation, by "relative" (activation over the largest in the store) or by "attribution", their effect on
a metric. `sl.LivePrompt(d, lm, store)` is a widget with sliders (extra `widget`).
"""

from saelens_lite.views.prompt import PromptRow, PromptView, prompt_view

__all__ = ["PromptRow", "PromptView", "prompt_view"]
