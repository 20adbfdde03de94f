"""Exporters, which write feature stores for other tools; one module for each tool."""
