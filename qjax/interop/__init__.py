"""Adapters to tools of others, one module each; a tool is imported with its adapter, never by ``import qjax``."""
