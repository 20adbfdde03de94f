"""The sparsity rules that come with saelens_lite: one file, one idea, one paper."""
