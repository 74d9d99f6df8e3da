"""A folder of results to tables, figures and a page: what `evaluate report` does.

naming     the model that a generator's name says: method, negatives, alpha
folder     what is in a folder of results; files that do not belong together are refused
verdicts   files of verdicts, read back
quantities what models are compared in
measures   what alpha can be chosen by, prompt by prompt
likelihoods what an external model said, read back
choosing   alpha, on one half of the prompts; reported on the other
tables     the tables, as values
markdown   tables as Markdown
curves     a figure against alpha, for the page; pictures: as PNG
page       one HTML file with the texts side by side
report     all of it
"""
