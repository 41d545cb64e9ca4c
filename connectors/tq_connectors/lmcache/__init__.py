"""LMCache: its stores on tq-store, and our codec in its serde. `connectors/README.md` shows the settings.

Files that import `lmcache` subclass its classes and translate; what they do is in the files that do not.
"""
