"""The sparsity rules that come with saelens_lite. Each file is one idea from one paper."""
