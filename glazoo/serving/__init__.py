"""Serving: the models of `glazoo.models` and every converted architecture in vLLM.

vLLM finds `glazoo.serving.plugin:register` by its entry point; nothing here is imported by the rest
of the package.
"""
