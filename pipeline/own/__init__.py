"""Optimizers of your own: a class in any file of this folder is `_target_: pipeline.own.FILE.CLASS` in its yaml.

docs/add-an-optimizer.md says how. The folder is a dependency of training, so a changed class is trained anew.
"""
