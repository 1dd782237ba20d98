"""The marks around special tokens that are to be taken literally, on their way through a chat template.

They are Unicode noncharacters, which no text in interchange contains.
"""

OPEN, CLOSE = "\ufdd0", "\ufdd1"
