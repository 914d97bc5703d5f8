"""The model card: README.md of an adapter or merged directory, made from the facts in its genrec.json and from nothing else.

`facts` gathers them, `page` puts the card together and writes it; the modules between the two write its sections.
What is not known is said to be unknown, and what was not measured has no number. The front matter follows the Hub's
specification of model cards (`huggingface_hub.ModelCardData`); every code block of a card is executed by a test.
"""
