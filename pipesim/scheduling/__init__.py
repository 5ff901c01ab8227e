"""The sans-IO scheduler: events in, commands out; policies; the token trie; partitions; cells.

Reading order: ``runs``, ``events``, ``commands`` (what crosses the border), ``scheduler`` (what happens on an event),
``generation`` (what the head knows and can do), ``policy`` and ``policies/`` (who decides).
"""
