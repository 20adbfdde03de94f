"""Look at a prompt: show the latents that fire in it, in notebooks and terminals, or live with sliders that steer the model.

```python
view = sl.prompt_view(d, lm, "The old man said that", "attribution", store=store)  # a notebook shades the tokens
```

```sh
saelens-lite prompt runs/topk/dictionary --prompt "The old man said" --by attribution
```

Latents are ranked by "activation", by "relative" (the activation divided by the latent's largest in the store) or by
"attribution" (the effect on a metric). `sl.LivePrompt(d, lm, store)` is a widget with sliders (extra `widget`).
"""

from saelens_lite.views.prompt import PromptRow, PromptView, prompt_view

__all__ = ["PromptRow", "PromptView", "prompt_view"]
