"""The plugins that come with saelens_lite: sparsity rules, file formats, loggers and more, found by name through entry points.

`saelens-lite plugins` lists what is installed, and `saelens-lite plugins --check NAME` checks one.
`SAELENS_LITE_PLUGINS=my-rules,loggers:my_logger` restricts which installed plugins may be loaded, by distribution or by kind
and name. The built-in ones may always be loaded, so an empty value leaves only these.
"""
