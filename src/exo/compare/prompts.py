"""The texts of a comparison."""

from pathlib import Path

from exo.compare.comparison import CompareError

PROMPTS = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the small boat came round the point. He put "
    "down his lamp, wiped his hands on his coat and went to see who",
    "Water expands when it freezes, which is unusual: most liquids shrink as they become solid. The reason is the "
    "arrangement of the molecules, which in ice",
    "def average(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return",
    "Question: A train leaves at 9:40 and arrives at 12:15. How long does the journey take?\nAnswer: From 9:40 to "
    "12:00 it takes 2 hours and 20 minutes, and",
    "Shopping list for Saturday:\n- two loaves of bread\n- a dozen eggs\n- butter\n- apples\n-",
    "Dear Ms. Novak,\n\nThank you for your letter of the 3rd of March. I am sorry to hear that the parcel was damaged. "
    "We will",
    "Die Stadt liegt an einem breiten Fluss, über den drei Brücken führen. Die älteste von ihnen wurde im Jahr",
    "Once upon a time there was a fox who could count to ten. One, two, three, four, five,",
)
"""Prose, a fact, code, arithmetic, a list, a letter, German and a pattern, each about thirty tokens long."""


def read_prompts(file: Path) -> tuple[str, ...]:
    """One prompt per line; blank lines are ignored. Raises CompareError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CompareError(f"prompts: {file} cannot be read: {error}") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise CompareError(f"prompts: {file} has no text; expected one prompt per line")
    return prompts
