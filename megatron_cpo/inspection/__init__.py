"""Looking at a store: its statistics, and its groups as people read them.

statistics   numbers of a whole store, in one pass
tokenizer    which tokenizer turns its ids into text
text         token ids as text that hides nothing
view         one group: what its tree shares, what differs from y_1, where y_1 is cut
terminal     both in a terminal
plots, page  both as one HTML file (page.css and page.js are its style and script)
document     what all pages share, those of `evaluation` too; drawing: what their plots share
"""
