"""The scenario library: questions in ``scenarios/``, answers in ``docs/studies/``, made by one command.

``python -m analysis.studies -o docs/studies [NAME ...]``

A study is a scenario file, whose header comment asks the question, and a module here of the same name, whose function
``study(bench)`` answers it. To add one is to add the two files.
"""
