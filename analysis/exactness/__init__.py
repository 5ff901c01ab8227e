"""The exactness campaign: random combinations of everything that could change a text, and none may."""
